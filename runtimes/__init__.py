"""The deployment runtimes, one a file. RUNTIMES is the one table of targets that recipes know."""

from collections.abc import Mapping
from types import MappingProxyType

if __name__ == "runtimes":  # from the repository root this would succeed and make every class twice
    raise ImportError("import mpcompile.runtimes, not runtimes")

from mpcompile.runtimes.eager import Eager
from mpcompile.runtimes.ort.cpu import OnnxRuntime
from mpcompile.runtimes.ort.cuda import OnnxRuntimeCuda
from mpcompile.runtimes.protocol import (
    Build,
    Engine,
    Judging,
    Predicting,
    Prepared,
    Product,
    QuantizedBaseline,
    Referring,
    Runtime,
    Shipping,
    Staging,
)
from mpcompile.runtimes.tensorrt.rtx import TensorRTForRTX
from mpcompile.runtimes.tensorrt.target import TensorRT

RUNTIMES: Mapping[str, Runtime] = MappingProxyType(
    {runtime.name: runtime for runtime in (Eager(), OnnxRuntime(), OnnxRuntimeCuda(), TensorRT(), TensorRTForRTX())}
)

__all__ = [
    "RUNTIMES",
    "Build",
    "Eager",
    "Engine",
    "Judging",
    "OnnxRuntime",
    "OnnxRuntimeCuda",
    "Predicting",
    "Prepared",
    "Product",
    "QuantizedBaseline",
    "Referring",
    "Runtime",
    "Shipping",
    "Staging",
    "TensorRT",
    "TensorRTForRTX",
]
