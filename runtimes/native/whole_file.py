"""Accepts native operators only if the whole file is significantly faster with them at every batch size.

An operator that is faster alone may slow the file: ONNX Runtime fuses nodes and chooses memory layouts around its own
operators. So the rewritten file is compared with the dense file. If it is not significantly faster at a batch size,
some operators are dropped and the rest is compared again, at most MOST_TRIALS times. If no trial succeeds, the file
stays dense.

"Significantly" means that the whole interval lies above 1 by the margin of mpcompile.measure.timing (INDISTINCT):
memory layout alone makes two builds of the same computation differ by as much, and several trials are several chances
of a lucky measurement. Ties are dense.

Nothing here measures or knows what an operator computes: callers give the comparison as a function.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mpcompile.measure.timing import Speedup
from mpcompile.system.progress import tracked

MOST_TRIALS = 4

Names = tuple[str, ...]
# The speedup of the file with these operators over the dense file, at a batch size.
Compare = Callable[[Names, int], Speedup]


@dataclass(frozen=True, slots=True)
class Loss:
    """A comparison in which the file with `operators` native operators was not significantly faster than dense."""

    operators: int
    batch: int
    speedup: Speedup


@dataclass(frozen=True, slots=True)
class Acceptance:
    """The operators that are accepted, and for each dropped one the last comparison that it was part of."""

    kept: Names
    dropped: Mapping[str, Loss]


def accept(
    speedups: Mapping[str, float], dropped_first: Collection[str], batches: Sequence[int], compare: Compare
) -> Acceptance:
    """Returns the operators with which the whole file is significantly faster than dense at each of `batches`.

    Args:
        speedups: for each operator the speedup that was measured for it alone.
        dropped_first: the operators that are dropped first, such as convolutions.
        batches: the batch sizes, in the order in which they are compared; a trial ends at the first loss.
        compare: measures one set of operators at one batch size.
    """
    dropped: dict[str, Loss] = {}
    for trial in trials(speedups, dropped_first):
        loss = _first_loss(trial, batches, compare)
        if loss is None:
            return Acceptance(trial, {name: lost for name, lost in dropped.items() if name not in trial})
        dropped |= dict.fromkeys(trial, loss)
    return Acceptance((), dropped)


def trials(speedups: Mapping[str, float], dropped_first: Collection[str]) -> Iterator[Names]:
    """Yields the sets of operators to try, each a part of the one before.

    First all operators, then all but `dropped_first`, then the half with the larger speedups of the last set, and so
    on. Operators keep their order.
    """
    current = tuple(speedups)
    for _ in range(MOST_TRIALS):
        if not current:
            return
        yield current
        others = tuple(name for name in current if name not in dropped_first)
        current = others if 0 < len(others) < len(current) else _faster_half(current, speedups)


def _faster_half(names: Names, speedups: Mapping[str, float]) -> Names:
    """Returns the half of the operators with the larger speedups, rounded down; on ties the earlier ones."""
    ranked = sorted(names, key=lambda name: -speedups[name])
    kept = set(ranked[: math.floor(len(names) / 2)])
    return tuple(name for name in names if name in kept)


def _first_loss(trial: Names, batches: Sequence[int], compare: Compare) -> Loss | None:
    """Returns the first comparison in which the file is not significantly faster, or None."""
    for batch in tracked(batches, "whole file, batch size {}".format, "batch sizes"):
        speedup = compare(trial, batch)
        if speedup.conclusion != "faster":
            return Loss(len(trial), batch, speedup)
    return None
