"""The patterns of one density that a runtime executes at the same speed: what `--pattern 50%` stands for."""

from fractions import Fraction
from typing import Protocol, runtime_checkable

from mpcompile.ir.pattern import NM
from mpcompile.ir.pattern_choice import Alternatives, choice_of, nested, patterns_in
from mpcompile.ir.precision import Precision
from mpcompile.runtimes.protocol import Runtime
from mpcompile.runtimes.quantized import has_sparse_kernel


@runtime_checkable
class ListsDensities(Protocol):
    """A runtime that knows which patterns of one density it executes at the same speed."""

    def patterns_at(self, density: Fraction, precision: Precision, rows: int) -> tuple[NM, ...]:
        """The patterns of this density that run at one measured speed, nested, freest first.

        `rows` neighbouring output channels share each. Raises UsageError if the runtime executes no such pattern faster
        than dense, and says which patterns it does.
        """
        ...


def choice_at(runtime: Runtime, density: Fraction, precision: Precision, rows: int = 1) -> NM | Alternatives:
    """What a density stands for on a runtime. Raises UsageError.

    A runtime that is no `ListsDensities` gets those patterns of `nested` that it has a sparse kernel for. If it has
    none, it gets all, because all run as dense, at one speed; the kernels of the target `ort` run these masks, too.
    """
    if isinstance(runtime, ListsDensities):
        return choice_of(runtime.patterns_at(density, precision, rows))
    patterns = nested(density, rows)
    return choice_of([p for p in patterns if has_sparse_kernel(runtime, p, precision)] or patterns)


def freest(runtime: Runtime, pattern: NM, precision: Precision) -> NM | Alternatives:
    """What the density of a pattern stands for on a runtime that knows the speed of the pattern.

    The pattern itself if the runtime is no `ListsDensities`, or if the pattern has a vocabulary or a wider M.
    """
    if not isinstance(runtime, ListsDensities) or pattern.vocabulary:
        return pattern
    choice = choice_at(runtime, Fraction(pattern.keep, pattern.of), precision, pattern.rows)
    return pattern if pattern.of > patterns_in(choice)[0].of else choice
