"""The patterns of one density that a runtime executes at the same speed: what `--pattern 50%` stands for."""

from fractions import Fraction
from typing import Protocol, runtime_checkable

from mpcompile.ir.pattern import NM
from mpcompile.ir.pattern_choice import Alternatives, choice_of, nested
from mpcompile.ir.precision import Precision
from mpcompile.runtimes.protocol import Runtime


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

    A runtime that is no `ListsDensities` gets the patterns of `nested`: without sparse kernels all run as dense, so all
    have the same speed. They are those of the target `ort`, so its kernels run the masks, too.
    """
    if isinstance(runtime, ListsDensities):
        return choice_of(runtime.patterns_at(density, precision, rows))
    return choice_of(nested(density, rows))


def freest(runtime: Runtime, pattern: NM, precision: Precision) -> NM | Alternatives:
    """The choice of a pattern's density on a runtime. The pattern itself if it has a wider M, or a vocabulary."""
    density = Fraction(pattern.keep, pattern.of)
    choice = choice_at(runtime, density, precision, pattern.rows)
    widest = choice.patterns[0].of if isinstance(choice, Alternatives) else choice.of
    return pattern if pattern.vocabulary or pattern.of > widest else choice
