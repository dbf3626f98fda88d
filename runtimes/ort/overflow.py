"""Half precision on calibration images: the first operator whose result is not finite."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpcompile.errors import ParityError
from mpcompile.export.onnx_export import INPUT, Exported
from mpcompile.runtimes.ort.session import PROVIDER, cpu_engine

SOURCES = ("Constant", "ConstantOfShape")
SCANNED_IMAGES = 32
SCANNED_AT_ONCE = 4  # every result of the network is in memory at once


def require_finite(exported: Exported, batches: Iterable[NDArray[np.float32]]) -> int:
    """How many images were run with finite results. Raises ParityError, naming the first operator that overflows.

    In half precision the result of every operator is looked at, not only the outputs: on a CPU ONNX Runtime computes
    in float32 and drops casts between neighbours, so that what overflows on a GPU may look fine here.
    """
    engine, scan, count, file = cpu_engine(exported), None, 0, exported.onnx
    for images in batches:
        if scan is None and exported.precision == "fp16":
            scan = OverflowScan(file)
        if scan is not None and count < SCANNED_IMAGES and (found := scan(images[: SCANNED_IMAGES - count])):
            raise ParityError(f"{file.name}: {found} overflows in half precision on calibration images; use fp32")
        if not np.isfinite(engine(images)).all():
            raise ParityError(f"{file.name}: outputs are not finite on calibration images")
        count += len(images)
    return count


class OverflowScan:
    """Runs a file with the result of every operator as an output, each in the type that the file gives it."""

    def __init__(self, file: Path) -> None:
        import onnx
        import onnxruntime

        model = onnx.load(file)
        self._nodes = [(name, node) for node in model.graph.node for name in node.output if name]
        stored = ((t.name, onnx.numpy_helper.to_array(t)) for t in model.graph.initializer)
        self._infinite = {name for name, values in stored if values.dtype.kind == "f" and not np.isfinite(values).all()}
        known = {output.name for output in model.graph.output}
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name, _ in self._nodes if name not in known)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        with tempfile.TemporaryDirectory() as folder:  # a file: what is over 2 GB does not pass as bytes
            path = Path(folder) / "scan.onnx"
            onnx.save_model(model, path, save_as_external_data=True)
            self._session = onnxruntime.InferenceSession(path, options, providers=[PROVIDER])
        self._fixed = self._session.get_inputs()[0].shape[0]

    def __call__(self, images: NDArray[np.float32]) -> str | None:
        """The first operator, in order of execution, that makes NaN or infinity out of finite numbers, or None.

        Masks of −∞, as attention has them, come from constants and are no overflow.
        """
        step = self._fixed if isinstance(self._fixed, int) else SCANNED_AT_ONCE
        names = [output.name for output in self._session.get_outputs()]
        for start in range(0, len(images), step):
            batch = np.resize(images[start : start + step], (step, *images.shape[1:]))
            found = dict(zip(names, self._session.run(names, {INPUT: batch}), strict=True))
            infinite = set(self._infinite)
            for name, node in self._nodes:
                if found[name].dtype.kind != "f" or np.isfinite(found[name]).all():
                    continue
                if node.op_type not in SOURCES and not infinite.intersection(node.input):
                    return f"{node.op_type} {node.name}"
                infinite.add(name)
        return None
