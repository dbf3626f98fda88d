"""Sessions of ONNX Runtime on the CPU as engines."""

import importlib.util
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpcompile.errors import BuildError, RuntimeMissing, cause_of
from mpcompile.export.half_precision import to_float32
from mpcompile.export.onnx_export import INPUT, Exported
from mpcompile.runtimes.batching import in_pieces

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
        onnx.save_model(to_float32(onnx.load(exported.onnx)), path, save_as_external_data=True)
        return replace(session_on(path, threads), file=exported.onnx)


def missing_reason() -> str | None:
    """What to install to have ONNX Runtime, or None."""
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed: pip install onnxruntime (or mpcompile[gpu])"
    return None


def session_on(file: Path, threads: int | None = None, library: Path | None = None) -> OrtEngine:
    """An engine on any ONNX file; `library` holds operators to register. Raises RuntimeMissing or BuildError."""
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeMissing(missing_reason() or f"onnxruntime does not import: {error}") from error
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
