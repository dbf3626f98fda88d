"""The targets `trt` (TensorRT 10 and 11) and `rtx` (TensorRT for RTX)."""

from mpcompile.runtimes.tensorrt.rtx import TensorRTForRTX
from mpcompile.runtimes.tensorrt.target import TensorRT

__all__ = ["TensorRT", "TensorRTForRTX"]
