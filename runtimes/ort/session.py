"""Engines on sessions of ONNX Runtime's CPU provider."""

import importlib.util
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpcompile.errors import BuildError, RuntimeMissing, cause_of
from mpcompile.export.half_precision import to_float32
from mpcompile.export.onnx_export import Exported
from mpcompile.ir.precision import QUANTIZED
from mpcompile.runtimes import native
from mpcompile.runtimes.batching import in_pieces
from mpcompile.runtimes.session_settings import STOP_SPINNING

if TYPE_CHECKING:
    import onnxruntime

    from mpcompile.measure.quantized_layer import QuantizedLayer

PROVIDER = "CPUExecutionProvider"
NATIVE = ".native"  # in the names of files with native operators
# Of a session. It keeps QuantizeLinear and DequantizeLinear as they are, and fuses no product with them.
WITHOUT_8_BIT_KERNELS = ("session.disable_quant_qdq", "1")


@dataclass(frozen=True)
class OrtEngine:
    """A session on a file. Calls are thread-safe, because ONNX Runtime's are.

    `exact` is False if products run on 8-bit kernels, which may saturate on this CPU.
    """

    session: "onnxruntime.InferenceSession"
    file: Path
    exact: bool = field(default=True, kw_only=True)

    def __call__(self, images: NDArray[np.float32], *others: NDArray[Any]) -> NDArray[np.float32]:
        """Returns the primary output, such as logits (b, outputs), of images (b, c, h, w). Raises BuildError.

        `others` are the further inputs of a model with several, in the order of the file.

        If the file's batch is fixed, a batch of another size runs in pieces of the fixed size.
        """
        try:
            fixed = self.session.get_inputs()[0].shape[0]
            if isinstance(fixed, int):
                return in_pieces(self._run, images, fixed, fixed, others)
            return self._run(images, *others)
        except Exception as error:  # ONNX Runtime's own types, and any error of a file with other inputs or outputs
            accepted = " and ".join("×".join(map(str, given.shape)) for given in self.session.get_inputs()) or "nothing"
            raise BuildError(
                f"{self.file.name} takes images of float32, {accepted}, and could not run {images.dtype} of shape "
                f"{images.shape}: {cause_of(error)}"
            ) from error

    @property
    def is_reference(self) -> bool:
        """False for subclasses, which use other kernels or another device, native operators, and 8-bit kernels."""
        return type(self) is OrtEngine and self.exact and not self.native

    @property
    def native(self) -> bool:
        """Whether the file has native operators."""
        return NATIVE in self.file.suffixes

    def _run(self, *inputs: NDArray[Any]) -> NDArray[np.float32]:
        names = [given.name for given in self.session.get_inputs()]
        outputs: list[NDArray[np.float32]] = self.session.run(None, dict(zip(names, inputs, strict=True)))
        return outputs[0]

    def layers(self) -> Sequence[Mapping[str, Any]]:
        """Returns one row per node of the file."""
        import onnx

        nodes = onnx.load(self.file, load_external_data=False).graph.node
        return [{"name": node.name, "op": node.op_type} for node in nodes]

    def quantised_layers(self, images: NDArray[np.float32]) -> "tuple[QuantizedLayer, ...]":
        """Returns for each quantised layer of the file whether it runs in 8 bits, from a profiled run on the images.

        Empty if the engine uses no 8-bit kernels. Raises BuildError.
        """
        if self.exact:
            return ()
        from mpcompile.runtimes.ort.int8_coverage import int8_coverage

        threads = int(self.session.get_session_options().intra_op_num_threads)
        library = native.library() if self.native else None
        return int8_coverage(self.file, images, threads or None, library)

    @property
    def device(self) -> str:
        return f"{self.session.get_providers()[0]}"


def native_file(onnx: Path) -> Path:
    """Returns the path of the variant of an ONNX file with the native operator: `….native.onnx` beside it."""
    return onnx.with_name(f"{onnx.stem}{NATIVE}.onnx")


def cpu_engine(exported: Exported, threads: int | None = None) -> OrtEngine:
    """Returns the engine that others are compared with: on the CPU, for any precision, in the file's own arithmetic.

    A bfloat16 file runs as its float32 copy. An 8-bit file runs without 8-bit kernels: they saturate on some CPUs. An
    FP8 file runs without any optimisation: ONNX Runtime 1.32 drops rectifiers before a quantisation to FP8, and refuses
    files with other clipping before one.
    """
    if exported.precision != "bf16":
        precise, plain = exported.precision not in QUANTIZED, exported.precision == "fp8"
        return session_on(exported.onnx, threads, kernels_8_bit=precise, optimised=not plain)
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / exported.onnx.name
        onnx.save_model(to_float32(onnx.load(exported.onnx)), path, save_as_external_data=True)
        return replace(session_on(path, threads), file=exported.onnx)


def missing_reason() -> str | None:
    """Returns what to install to use ONNX Runtime, or None."""
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed: pip install onnxruntime (or mpcompile[gpu])"
    return None


def fast_engine(exported: Exported, threads: int | None = None) -> OrtEngine:
    """Returns the fastest engine on the CPU for a file: as `cpu_engine`, but with 8-bit kernels for an int8 file."""
    if exported.precision == "int8":
        return replace(session_on(exported.onnx, threads), exact=False)
    return cpu_engine(exported, threads)


def session_on(
    file: Path,
    threads: int | None = None,
    library: Path | None = None,
    kernels_8_bit: bool = True,
    optimised: bool = True,
) -> OrtEngine:
    """Returns an engine on an ONNX file. Raises RuntimeMissing or BuildError.

    `library` is a shared library of custom operators to register; `kernels_8_bit` whether QuantizeLinear and
    DequantizeLinear are fused with the operators between them, `optimised` whether ONNX Runtime rewrites the graph at
    all. The session's provider is checked, because ONNX Runtime
    falls back to another one silently.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeMissing(missing_reason() or f"onnxruntime does not import: {error}") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only; warnings, such as of unused initializers, do not concern users
    options.add_session_config_entry(*STOP_SPINNING)
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if not kernels_8_bit:
        options.add_session_config_entry(*WITHOUT_8_BIT_KERNELS)
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
