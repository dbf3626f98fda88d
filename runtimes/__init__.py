"""The deployment runtimes, one a file. RUNTIMES is the one table of targets that recipes know."""

from collections.abc import Mapping
from types import MappingProxyType

if __name__ == "runtimes":  # from the repository root this would succeed and make every class twice
    raise ImportError("import mpcompile.runtimes, not runtimes")

from mpcompile.runtimes.eager import Eager
from mpcompile.runtimes.ort import OnnxRuntime
from mpcompile.runtimes.protocol import Engine, Runtime

RUNTIMES: Mapping[str, Runtime] = MappingProxyType({Eager.name: Eager(), OnnxRuntime.name: OnnxRuntime()})

__all__ = ["RUNTIMES", "Eager", "Engine", "OnnxRuntime", "Runtime"]
