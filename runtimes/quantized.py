"""The optional protocol of a runtime that runs files in 8 bits, and its sparse kernels for a precision."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from mpcompile.ir.pattern import NM
from mpcompile.ir.precision import QUANTIZED, Precision
from mpcompile.runtimes.protocol import Runtime


@runtime_checkable
class RunsQuantized(Protocol):
    """A runtime that runs files in int8, and perhaps fp8, on kernels of that type."""

    def quantization(self, precision: Precision) -> Mapping[str, Any]:
        """Parameters of the pass `quantize` that its 8-bit kernels need, such as `activations` and `outputs`.

        A recipe that does not give these parameters gets them. `activations` must be the one that is returned.
        """
        ...

    def has_quantized_kernel(self, pattern: NM) -> bool:
        """Whether it has a sparse kernel for this pattern in 8 bits."""
        ...


def has_sparse_kernel(runtime: Runtime, pattern: NM, precision: Precision) -> bool:
    """Whether a runtime has a sparse kernel for this pattern in files of this precision."""
    if precision in QUANTIZED:
        return isinstance(runtime, RunsQuantized) and runtime.has_quantized_kernel(pattern)
    return runtime.has_kernel(pattern)
