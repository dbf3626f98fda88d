"""The optional protocols of a runtime that runs files in 8 bits, and its sparse kernels for a precision."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from mpcompile.ir.pattern import NM
from mpcompile.ir.precision import QUANTIZED, Precision
from mpcompile.measure.timing import Speedup
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


@dataclass(frozen=True, slots=True)
class QuantizedGemm:
    """The shape of a matrix product in 8 bits: (tokens, in) times the transposed weight (out, in).

    `pattern` is that of the mask; None if the layer is dense or its pattern has no sparse kernel.
    """

    out: int
    in_: int
    tokens: int
    pattern: NM | None


@dataclass(frozen=True, slots=True)
class QuantizedSpeed:
    """The measured speed of a matrix product in 8 bits.

    Attributes:
        dense: the product dense in 8 bits, on the fastest kernel, over the product dense in fp32.
        masked: the masked product over the product dense in 8 bits; None if there is no mask.
    """

    dense: Speedup
    masked: Speedup | None = None


@runtime_checkable
class MeasuresQuantized(Protocol):
    """A runtime that times products in 8 bits on this machine, masked and dense."""

    def auto_quantized_patterns(self, precision: Precision, rows: int) -> tuple[NM, ...]:
        """The patterns that `--pattern auto` lets a budget choose from in 8 bits; empty without sparse kernels.

        `rows` neighbouring output channels share each of them. Raises UsageError if none saves time.
        """
        ...

    def predicted_quantized(
        self, products: Mapping[str, QuantizedGemm], precision: Precision
    ) -> Mapping[str, QuantizedSpeed]:
        """The measured speed by layer name; products that it cannot time are left out."""
        ...


def has_sparse_kernel(runtime: Runtime, pattern: NM, precision: Precision) -> bool:
    """Whether a runtime has a sparse kernel for this pattern in files of this precision."""
    if precision in QUANTIZED:
        return isinstance(runtime, RunsQuantized) and runtime.has_quantized_kernel(pattern)
    return runtime.has_kernel(pattern)


def fast_patterns(runtime: Runtime, precision: Precision, rows: int) -> tuple[NM, ...]:
    """The patterns that `--pattern auto` lets a budget choose from in files of this precision.

    Only runtimes with `MeasuresQuantized` have others in 8 bits, and only these measure with `rows` sharing rows.
    """
    if precision in QUANTIZED and isinstance(runtime, MeasuresQuantized):
        return runtime.auto_quantized_patterns(precision, rows)
    return runtime.auto_patterns()
