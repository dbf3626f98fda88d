"""The record of a search for a recipe: what was asked, each model tried, and which was taken."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mpcompile.measure.timing import Speedup


@dataclass(frozen=True, slots=True)
class Point:
    """One model on validation images, against the dense one.

    `drop` is in points of top-1, `error` its standard error (of the paired difference), `macs` the share of
    multiply-accumulates left, `speedups` one for each batch size timed. `failed` says why a recipe made no model,
    `method` how a quantised model was quantised and why so.
    """

    name: str
    macs: float | None = None
    drop: float | None = None
    error: float | None = None
    speedups: tuple[Speedup, ...] = ()
    holds: bool = False
    failed: str | None = None
    method: str | None = None

    @property
    def speed(self) -> float:
        """How many times as fast as dense, the geometric mean over batches; by multiply-accumulates where untimed."""
        if not self.speedups:
            return 1 / self.macs if self.macs else 0.0
        return _geometric_mean([found.ratio for found in self.speedups])

    @property
    def speed_interval(self) -> tuple[float, float]:
        """The geometric means of the lower and of the upper ends of the speedups' intervals; `speed` where untimed."""
        if not self.speedups:
            return self.speed, self.speed
        low, high = zip(*(found.interval for found in self.speedups), strict=True)
        return _geometric_mean(low), _geometric_mean(high)


def _geometric_mean(values: Sequence[float]) -> float:
    return math.prod(values) ** (1.0 / len(values))


@dataclass(frozen=True, slots=True)
class Tuning:
    """What was asked of the search, every recipe that was tried, and which was taken.

    `references` are the dense model quantised, for comparison: they were not candidates.
    """

    limit: float  # points of top-1
    allowed: int  # evaluations
    images: int  # for validation
    batches: tuple[int, ...]
    points: tuple[Point, ...]
    chosen: str
    references: tuple[Point, ...] = ()

    def as_fast(self) -> tuple[str, ...]:
        """The other recipes within the limit whose speed interval overlaps that of the chosen one."""
        taken = next(point for point in self.points if point.name == self.chosen)
        others = (point for point in self.points if point.holds and point.name != self.chosen)
        (low, high), timed = taken.speed_interval, bool(self.batches)
        return tuple(
            other.name
            for other in others
            if timed and other.speed_interval[0] <= high and low <= other.speed_interval[1]
        )
