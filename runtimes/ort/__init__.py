"""The targets `ort` (ONNX Runtime on the CPU) and `ort-cuda` (on an NVIDIA GPU)."""

from mpcompile.runtimes.ort.cpu import OnnxRuntime
from mpcompile.runtimes.ort.cuda import OnnxRuntimeCuda

__all__ = ["OnnxRuntime", "OnnxRuntimeCuda"]
