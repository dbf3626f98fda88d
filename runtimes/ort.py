"""ONNX Runtime on the CPU.

It has no N:M kernels: a masked weight runs as a dense one, so a pattern alone gains nothing here, and reports say
so. Sessions are checked for the provider that was asked for, because ONNX Runtime falls back silently.
"""

import importlib.metadata
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mpcompile.errors import BuildError, ParityError, RuntimeMissing
from mpcompile.lower import INPUT, Lowered
from mpcompile.model import NM

if TYPE_CHECKING:
    import onnxruntime

PROVIDER = "CPUExecutionProvider"


@dataclass(frozen=True)
class OrtEngine:
    """One session; calls are thread-safe, as ONNX Runtime's are."""

    session: "onnxruntime.InferenceSession"
    file: Path

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits of a batch; one of another size than a fixed one is run in pieces of that size."""
        fixed = self.session.get_inputs()[0].shape[0]
        if not isinstance(fixed, int) or fixed == len(images):
            return self._run(images)
        short = -len(images) % fixed
        padded = np.concatenate([images, np.repeat(images[-1:], short, axis=0)]) if short else images
        pieces = [self._run(padded[start : start + fixed]) for start in range(0, len(padded), fixed)]
        return np.concatenate(pieces)[: len(images)]

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
    accelerates: ClassVar[frozenset[NM]] = frozenset()

    def missing(self) -> str | None:
        """What to install, or None."""
        if importlib.util.find_spec("onnxruntime") is None:
            return "onnxruntime is not installed: pip install onnxruntime (or mpcompile[gpu])"
        return None

    def versions(self) -> Mapping[str, str]:
        return {"onnxruntime": importlib.metadata.version("onnxruntime")}

    def build(self, lowered: Lowered, threads: int | None = None) -> OrtEngine:
        """A session on the file, on the CPU, with that many threads or ONNX Runtime's own choice."""
        return session_on(lowered.onnx, threads)


def session_on(file: Path, threads: int | None = None) -> OrtEngine:
    """An engine on any ONNX file. Raises RuntimeMissing or BuildError."""
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeMissing(OnnxRuntime().missing() or f"onnxruntime does not import: {error}") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; what it warns of, such as unused initializers, is no news here
    if threads:
        options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(file, options, providers=[PROVIDER])
    except Exception as error:
        raise BuildError(f"ONNX Runtime {onnxruntime.__version__} cannot load {file.name}: {error}") from error
    if PROVIDER not in session.get_providers():
        raise RuntimeMissing(f"ONNX Runtime was asked for {PROVIDER} and gave {session.get_providers()}")
    return OrtEngine(session, file)


def require_finite(file: Path, batches: Iterator[NDArray[np.float32]]) -> int:
    """How many images were run with finite outputs. Raises ParityError, naming the first operator that overflows."""
    engine, count = session_on(file), 0
    for images in batches:
        if not np.isfinite(engine(images)).all():
            raise ParityError(
                f"{file.name}: outputs are not finite from {first_overflow(file, images)}; "
                "half precision overflows there, use --precision fp32"
            )
        count += len(images)
    return count


def first_overflow(file: Path, images: NDArray[np.float32]) -> str:
    """The first operator, in order of execution, whose result holds NaN or infinity."""
    import onnx
    import onnxruntime

    model = onnx.load(file)
    del model.graph.output[1:]
    results = [(name, node) for node in model.graph.node for name in node.output if name]
    known = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name, _ in results if name not in known)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[PROVIDER])
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(names, {INPUT: images[:1]}), strict=True))
    for name, node in results:
        values = found[name]
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            return f"{node.op_type} {node.name}"
    return "an operator that is finite on the first image"
