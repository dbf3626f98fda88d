"""ONNX Runtime on the CPU. Target `ort`.

By itself it has no N:M kernels and runs a masked weight as a dense one; native/ adds one, which build() uses where it
was built and measured to be faster. Sessions are checked for the provider that was asked for, because ONNX Runtime
falls back silently.
"""

import importlib.util
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mpcompile.errors import BuildError, ParityError, RuntimeMissing, cause_of
from mpcompile.half import widened
from mpcompile.lower import INPUT, Exported
from mpcompile.model import NM
from mpcompile.runtimes import native
from mpcompile.runtimes.pieces import in_pieces
from mpcompile.runtimes.protocol import Build, Prepared, Product, QuantizedBaseline
from mpcompile.timing import Speedup

if TYPE_CHECKING:
    import onnxruntime

PROVIDER = "CPUExecutionProvider"
SOURCES = ("Constant", "ConstantOfShape")
SCANNED_IMAGES = 32
SCANNED_AT_ONCE = 4  # every result of the network is in memory at once


@dataclass(frozen=True)
class OrtEngine:
    """One session; calls are thread-safe, as ONNX Runtime's are."""

    session: "onnxruntime.InferenceSession"
    file: Path

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits of a batch; one of another size than a fixed one is run in pieces of that size."""
        try:
            fixed = self.session.get_inputs()[0].shape[0]
            return in_pieces(self._run, images, fixed, fixed) if isinstance(fixed, int) else self._run(images)
        except Exception as error:  # its own kinds, and whatever a file without images or logits leads to
            taken = " and ".join("×".join(map(str, given.shape)) for given in self.session.get_inputs()) or "nothing"
            raise BuildError(
                f"{self.file.name} takes images of float32, {taken}, and could not run {images.dtype} of shape "
                f"{images.shape}: {cause_of(error)}"
            ) from error

    def _run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = self.session.run(None, {INPUT: images})[0]
        return logits

    def layers(self) -> Sequence[Mapping[str, Any]]:
        """One row a node of the file."""
        import onnx

        nodes = onnx.load(self.file, load_external_data=False).graph.node
        return [{"name": node.name, "op": node.op_type} for node in nodes]

    @property
    def device(self) -> str:
        return f"{self.session.get_providers()[0]}"


@dataclass(frozen=True)
class OnnxRuntime:
    """Target `ort`."""

    name: ClassVar[str] = "ort"
    offline: ClassVar[bool] = False

    def kernels(self) -> str:
        """Any, where our kernel is there."""
        missing = native.missing()
        return f"none: {missing}" if missing else f"any N:M in float32 ({native.instruction_set()})"

    def has_kernel(self, pattern: NM) -> bool:
        """Whether our kernel is there: it takes any pattern. That it is faster is measured when an engine is built."""
        return native.missing() is None

    def auto_patterns(self) -> tuple[NM, ...]:
        """N of 32 for every N that is surely faster than dense on this machine."""
        from mpcompile.runtimes.native import auto

        library = native.library()
        return auto.worth_having(auto.measured(library)) if library else ()

    def predicted(self, products: Mapping[str, Product]) -> Mapping[str, Speedup]:
        """How many times as fast as dense each product is here: measured on random weights, one of each shape."""
        from mpcompile.runtimes.native.auto import speedup_of

        library = native.library()
        if library is None:
            return {}
        known = {
            product: speedup_of(product.pattern, product.out, product.in_, product.tokens, library)
            for product in dict.fromkeys(products.values())
        }
        return {name: known[product] for name, product in products.items()}

    def references(
        self, exported: Exported, build: Build, images: NDArray[np.float32], folder: Path
    ) -> Mapping[str, QuantizedBaseline | str]:
        """The dense model in int8, by dynamic and by static quantisation, each as exact as this processor allows."""
        from mpcompile.runtimes.ort_int8 import quantised, saturates

        return quantised(exported, build.threads, images, folder, saturating=saturates())

    def shipped(self, exported: Exported, threads: int | None) -> "tuple[Path, OrtEngine] | None":
        """`….native.onnx` on our kernel, with the layers on it that were chosen when the model was compiled."""
        file, library = native_file(exported.onnx), native.library()
        return (file, session_on(file, threads, library)) if library and file.is_file() else None

    def missing(self) -> str | None:
        """What to install, or None."""
        if importlib.util.find_spec("onnxruntime") is None:
            return "onnxruntime is not installed: pip install onnxruntime (or mpcompile[gpu])"
        return None

    def idle(self) -> str | None:
        """It runs where it is installed."""
        return None

    def refuses(self, precision: str, threads: int | None) -> str | None:
        """It runs float32 and float16 on any number of threads."""
        return "it has no bfloat16 kernels on a CPU; use fp32 or fp16" if precision == "bf16" else None

    def versions(self) -> Mapping[str, str]:
        """The library's own word: it comes as onnxruntime or as onnxruntime-gpu."""
        import onnxruntime

        kernel = {} if native.missing() else {"N:M kernel": native.instruction_set()}
        return {"onnxruntime": onnxruntime.__version__, **kernel}

    def prepare(self, exported: Exported, folder: Path, build: Build) -> Prepared:
        """Nothing: it runs the file as it is."""
        return Prepared()

    def build(self, exported: Exported, build: Build) -> OrtEngine:
        """A session on the CPU, with that many threads or ONNX Runtime's own choice; masked products on our kernel
        where that is faster here.
        """
        library = native.library() if build.sparse and exported.masks else None
        if library is None:
            return session_on(exported.onnx, build.threads)
        from mpcompile.runtimes.ort_native import native_engine

        return native_engine(exported, build, library)


def native_file(onnx: Path) -> Path:
    """Where the file for our kernel lies that stands for another one."""
    return onnx.with_name(f"{onnx.stem}.native.onnx")


def cpu_engine(exported: Exported, threads: int | None = None) -> OrtEngine:
    """An engine on the CPU for any precision: a bfloat16 file runs as its copy in float32."""
    if exported.precision != "bf16":
        return session_on(exported.onnx, threads)
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / exported.onnx.name
        onnx.save_model(widened(onnx.load(exported.onnx)), path, save_as_external_data=True)
        return replace(session_on(path, threads), file=exported.onnx)


def session_on(file: Path, threads: int | None = None, library: Path | None = None) -> OrtEngine:
    """An engine on any ONNX file; `library` holds operators to register. Raises RuntimeMissing or BuildError."""
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeMissing(OnnxRuntime().missing() or f"onnxruntime does not import: {error}") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; what it warns of, such as unused initializers, is no news here
    if threads:
        options.intra_op_num_threads = threads
    try:
        if library is not None:
            options.register_custom_ops_library(str(library))
        session = onnxruntime.InferenceSession(file, options, providers=[PROVIDER])
    except Exception as error:
        raise BuildError(f"ONNX Runtime {onnxruntime.__version__} cannot load {file.name}: {error}") from error
    if PROVIDER not in session.get_providers():
        raise RuntimeMissing(f"ONNX Runtime was asked for {PROVIDER} and gave {session.get_providers()}")
    return OrtEngine(session, file)


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
