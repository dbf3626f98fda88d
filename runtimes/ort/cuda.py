"""Target `ort-cuda`: ONNX Runtime on an NVIDIA GPU, the strongest dense baseline without TensorRT.

It has no sparse kernels. Each session's provider is checked, because ONNX Runtime lists providers that cannot load and
falls back to the CPU without an error.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mpcompile.errors import BuildError, RuntimeMissing
from mpcompile.export.onnx_export import Exported
from mpcompile.ir.precision import QUANTIZED
from mpcompile.runtimes.nvidia import Gpu, first_gpu
from mpcompile.runtimes.ort.session import OrtEngine
from mpcompile.runtimes.protocol import Build, Prepared, WithoutKernels

if TYPE_CHECKING:
    import onnxruntime

PROVIDER = "CUDAExecutionProvider"


@dataclass(frozen=True)
class OrtCudaEngine(OrtEngine):
    """A session on the first GPU, and the name of that GPU."""

    gpu: str

    @property
    def device(self) -> str:
        return self.gpu

    def staged(self, images: NDArray[np.float32], *, transfers: bool, graph: bool) -> Callable[[], object]:
        """Returns the call that the harness times. Without `transfers`, images and logits stay on the GPU.

        Raises BuildError with `graph`: this target has no CUDA graphs.
        """
        if graph:
            raise BuildError("target ort-cuda records no CUDA graphs; leave --cuda-graph out")
        if transfers:
            return lambda: self._run(images)
        import onnxruntime

        binding = self.session.io_binding()
        binding.bind_ortvalue_input(
            self.session.get_inputs()[0].name, onnxruntime.OrtValue.ortvalue_from_numpy(images, "cuda", 0)
        )
        for output in self.session.get_outputs():
            binding.bind_output(output.name, "cuda", 0)

        def run_bound() -> None:
            self.session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return run_bound


@dataclass(frozen=True)
class OnnxRuntimeCuda(WithoutKernels):
    """The target `ort-cuda`."""

    name: ClassVar[str] = "ort-cuda"
    offline: ClassVar[bool] = False

    def missing(self) -> str | None:
        """Returns what to install, or None."""
        if isinstance(gpu := first_gpu(), str):
            return gpu
        import onnxruntime

        if PROVIDER not in onnxruntime.get_available_providers():
            return (
                "onnxruntime is installed without CUDA: pip uninstall onnxruntime onnxruntime-gpu, then pip install "
                "onnxruntime-gpu; both write the same files, so only the one installed last can be used"
            )
        return None

    def idle(self) -> str | None:
        """Returns None: it runs where it is installed."""
        return None

    def refuses(self, precision: str, threads: int | None) -> str | None:
        """Returns why an 8-bit precision or `--threads` cannot be used."""
        if precision in QUANTIZED:
            return "it has no 8-bit kernels for such files on a GPU and would run them in float32; use --target trt"
        return None if threads is None else "--threads is for targets on a CPU; leave it out"

    def versions(self) -> Mapping[str, str]:
        """Returns the version of ONNX Runtime."""
        import onnxruntime

        return {"onnxruntime": onnxruntime.__version__}

    def prepare(self, exported: Exported, folder: Path, build: Build) -> Prepared:
        """Returns nothing: it runs the file as it is."""
        return Prepared()

    def build(self, exported: Exported, build: Build) -> OrtCudaEngine:
        """Returns a session on the first GPU. Raises RuntimeMissing or BuildError."""
        if missing := self.missing():
            raise RuntimeMissing(f"target {self.name}: {missing}")
        gpu = first_gpu()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            session = onnxruntime.InferenceSession(exported.onnx, options, providers=[(PROVIDER, {"use_tf32": 0})])
        except Exception as error:
            raise BuildError(
                f"ONNX Runtime {onnxruntime.__version__} cannot load {exported.onnx.name}: {error}"
            ) from error
        return OrtCudaEngine(_require_cuda(session), exported.onnx, str(gpu.name) if isinstance(gpu, Gpu) else str(gpu))


def _require_cuda(session: "onnxruntime.InferenceSession") -> Any:
    """Returns the session. Raises RuntimeMissing if it fell back to another provider."""
    providers = session.get_providers()
    if providers[0] != PROVIDER:
        raise RuntimeMissing(
            f"ONNX Runtime was asked for {PROVIDER} and gave {', '.join(providers)}: its CUDA libraries do not load"
        )
    return session
