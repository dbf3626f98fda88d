"""Checks that a file computes finite results on calibration images, and finds the operator that overflows."""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpcompile.errors import ParityError
from mpcompile.export.onnx_export import Exported
from mpcompile.runtimes.ort.session import PROVIDER, cpu_engine

CONSTANT_OPS = ("Constant", "ConstantOfShape")
SCANNED_IMAGES = 32
SCAN_BATCH = 4  # images; the outputs of all operators are in memory at once


def require_finite(exported: Exported, batches: Iterable[tuple[NDArray[Any], ...]]) -> int:
    """Returns the number of images run. Raises ParityError if an output is not finite.

    For a float16 file, the outputs of every operator are checked too, on up to SCANNED_IMAGES images, and the error
    names the first operator that overflows. On a CPU, ONNX Runtime computes in float32 and drops casts between
    neighbouring operators, so an overflow that a GPU has may not show in the logits here.
    """
    engine, scan, count, file = cpu_engine(exported), None, 0, exported.onnx
    for inputs in batches:
        images = inputs[0]
        if scan is None and exported.precision == "fp16":
            scan = OverflowScan(file)
        scanned = [given[: max(SCANNED_IMAGES - count, 0)] for given in inputs]
        if scan is not None and len(scanned[0]) and (node := scan(*scanned)):
            raise ParityError(f"{file.name}: {node} overflows in half precision on calibration images; use fp32")
        if not np.isfinite(engine(*inputs)).all():
            raise ParityError(f"{file.name}: outputs are not finite on calibration images")
        count += len(images)
    return count


class OverflowScan:
    """Runs a file with the output of every operator as a graph output, in its own type, without graph optimisations."""

    def __init__(self, file: Path) -> None:
        import onnx
        import onnxruntime

        model = onnx.load(file)
        self._nodes = [(name, node) for node in model.graph.node for name in node.output if name]
        stored = ((t.name, onnx.numpy_helper.to_array(t)) for t in model.graph.initializer)
        self._infinite = {name for name, values in stored if values.dtype.kind == "f" and not np.isfinite(values).all()}
        outputs = {output.name for output in model.graph.output}
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name, _ in self._nodes if name not in outputs)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        with tempfile.TemporaryDirectory() as folder:  # a file, since a model over 2 GB cannot be given as bytes
            path = Path(folder) / "scan.onnx"
            onnx.save_model(model, path, save_as_external_data=True)
            self._session = onnxruntime.InferenceSession(path, options, providers=[PROVIDER])
        self._inputs = [given.name for given in self._session.get_inputs()]
        self._batch = self._session.get_inputs()[0].shape[0]

    def __call__(self, *inputs: NDArray[Any]) -> str | None:
        """Returns the first operator in execution order with finite inputs and a result that is not finite, or None.

        The −∞ of attention masks comes from constants and is not an overflow.
        """
        step = self._batch if isinstance(self._batch, int) else SCAN_BATCH
        names = [output.name for output in self._session.get_outputs()]
        for start in range(0, len(inputs[0]), step):
            batch = [np.resize(given[start : start + step], (step, *given.shape[1:])) for given in inputs]
            feeds = dict(zip(self._inputs, batch, strict=True))
            results = dict(zip(names, self._session.run(names, feeds), strict=True))
            infinite = set(self._infinite)
            for name, node in self._nodes:
                if results[name].dtype.kind != "f" or np.isfinite(results[name]).all():
                    continue
                if node.op_type not in CONSTANT_OPS and not infinite.intersection(node.input):
                    return f"{node.op_type} {node.name}"
                infinite.add(name)
        return None
