"""The deployment runtimes. RUNTIMES maps each target name that a recipe can use to its runtime."""

from collections.abc import Mapping
from types import MappingProxyType

if __name__ == "runtimes":  # this import works in the repository root, and would define every class twice
    raise ImportError("import mpcompile.runtimes, not runtimes")

from mpcompile.runtimes.densities import ListsDensities, choice_at, freest
from mpcompile.runtimes.eager import Eager
from mpcompile.runtimes.ort.cpu import OnnxRuntime
from mpcompile.runtimes.ort.cuda import OnnxRuntimeCuda
from mpcompile.runtimes.protocol import (
    RENAMED,
    Build,
    Engine,
    GemmShape,
    HasQuantizedBaselines,
    LoadsFile,
    PredictsSpeed,
    Prepared,
    QuantizedBaseline,
    ReportsKernels,
    ReportsQuantizedLayers,
    ReportsReference,
    RunsGraph,
    Runtime,
    ShipsFile,
    TimesDevice,
)
from mpcompile.runtimes.quantized import (
    MeasuresQuantized,
    QuantizedGemm,
    QuantizedSpeed,
    RunsQuantized,
    fast_patterns,
    has_sparse_kernel,
)
from mpcompile.runtimes.tensorrt.rtx import TensorRTForRTX
from mpcompile.runtimes.tensorrt.target import TensorRT
from mpcompile.system.moved_modules import renamed_names

RUNTIMES: Mapping[str, Runtime] = MappingProxyType(
    {runtime.name: runtime for runtime in (Eager(), OnnxRuntime(), OnnxRuntimeCuda(), TensorRT(), TensorRTForRTX())}
)

__all__ = [
    "RUNTIMES",
    "Build",
    "Eager",
    "Engine",
    "GemmShape",
    "HasQuantizedBaselines",
    "ListsDensities",
    "LoadsFile",
    "MeasuresQuantized",
    "OnnxRuntime",
    "OnnxRuntimeCuda",
    "PredictsSpeed",
    "Prepared",
    "QuantizedBaseline",
    "QuantizedGemm",
    "QuantizedSpeed",
    "ReportsKernels",
    "ReportsQuantizedLayers",
    "ReportsReference",
    "RunsGraph",
    "RunsQuantized",
    "Runtime",
    "ShipsFile",
    "TensorRT",
    "TensorRTForRTX",
    "TimesDevice",
    "choice_at",
    "fast_patterns",
    "freest",
    "has_sparse_kernel",
]

__getattr__ = renamed_names(__name__, RENAMED)
