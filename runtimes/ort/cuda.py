"""ONNX Runtime on an NVIDIA GPU. Target `ort-cuda`: the strongest dense baseline where there is no TensorRT.

It has no sparse kernels. A session is checked for the provider that was asked for: ONNX Runtime lists providers that
cannot load, and falls back to the CPU without an error.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mpcompile.errors import BuildError, RuntimeMissing
from mpcompile.export.onnx_export import INPUT, OUTPUT, Exported
from mpcompile.runtimes.nvidia import Gpu, first_gpu
from mpcompile.runtimes.ort.session import OrtEngine
from mpcompile.runtimes.protocol import Build, Prepared, WithoutKernels

if TYPE_CHECKING:
    import onnxruntime

PROVIDER = "CUDAExecutionProvider"


@dataclass(frozen=True)
class OrtCudaEngine(OrtEngine):
    """One session on the first GPU, and its name."""

    gpu: str

    @property
    def device(self) -> str:
        return self.gpu

    def staged(self, images: NDArray[np.float32], *, transfers: bool, graph: bool) -> Callable[[], object]:
        """One call as the harness times it; without transfers images and logits stay on the GPU."""
        if graph:
            raise BuildError("target ort-cuda records no CUDA graphs; leave --cuda-graph out")
        if transfers:
            return lambda: self._run(images)
        import onnxruntime

        binding = self.session.io_binding()
        binding.bind_ortvalue_input(INPUT, onnxruntime.OrtValue.ortvalue_from_numpy(images, "cuda", 0))
        binding.bind_output(OUTPUT, "cuda", 0)

        def once() -> None:
            self.session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return once


@dataclass(frozen=True)
class OnnxRuntimeCuda(WithoutKernels):
    """Target `ort-cuda`."""

    name: ClassVar[str] = "ort-cuda"
    offline: ClassVar[bool] = False

    def missing(self) -> str | None:
        """What to install, or None."""
        if isinstance(gpu := first_gpu(), str):
            return gpu
        import onnxruntime

        if PROVIDER not in onnxruntime.get_available_providers():
            return (
                "onnxruntime is installed without CUDA: pip uninstall onnxruntime onnxruntime-gpu, then pip install "
                "onnxruntime-gpu; the two share their files, and the last one installed is the one that is there"
            )
        return None

    def idle(self) -> str | None:
        """It runs where it is installed."""
        return None

    def refuses(self, precision: str, threads: int | None) -> str | None:
        """It runs any precision on the GPU."""
        return None if threads is None else "threads are those of a CPU; leave --threads out"

    def versions(self) -> Mapping[str, str]:
        """The library's own word."""
        import onnxruntime

        return {"onnxruntime": onnxruntime.__version__}

    def prepare(self, exported: Exported, folder: Path, build: Build) -> Prepared:
        """Nothing: it runs the file as it is."""
        return Prepared()

    def build(self, exported: Exported, build: Build) -> OrtCudaEngine:
        """A session on the file, on the first GPU. Raises RuntimeMissing or BuildError."""
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
        return OrtCudaEngine(_on_gpu(session), exported.onnx, str(gpu.name) if isinstance(gpu, Gpu) else str(gpu))


def _on_gpu(session: "onnxruntime.InferenceSession") -> Any:
    """The session, if it is where it was asked to be. Raises RuntimeMissing."""
    got = session.get_providers()
    if got[0] != PROVIDER:
        raise RuntimeMissing(
            f"ONNX Runtime was asked for {PROVIDER} and gave {', '.join(got)}: its CUDA libraries do not load"
        )
    return session
