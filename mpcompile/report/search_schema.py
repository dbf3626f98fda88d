"""The record of a search for a recipe: its limits, every model that was tried, and the chosen one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mpcompile.measure.timing import Speedup


@dataclass(frozen=True, slots=True)
class Point:
    """One model compared with the dense model on validation images.

    `drop` is the loss of top-1 in percentage points, `error` the standard error of that paired difference, `macs` the
    share of multiply-accumulates that remain, `speedups` one value for each batch size. `holds` says whether drop and
    error are within the limit. `failed` is the reason why a recipe produced no model, `method` how an int8 model was
    quantised, and why.
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
        """Speedup over dense, the geometric mean over batch sizes; the ratio of MACs if nothing was timed."""
        if not self.speedups:
            return 1 / self.macs if self.macs else 0.0
        return _geometric_mean([found.ratio for found in self.speedups])

    @property
    def speed_interval(self) -> tuple[float, float]:
        """Geometric means of the lower and of the upper ends of the speedup intervals; `speed` twice if not timed."""
        if not self.speedups:
            return self.speed, self.speed
        low, high = zip(*(found.interval for found in self.speedups), strict=True)
        return _geometric_mean(low), _geometric_mean(high)


def _geometric_mean(values: Sequence[float]) -> float:
    return math.prod(values) ** (1.0 / len(values))


@dataclass(frozen=True, slots=True)
class Tuning:
    """The limits of the search, every recipe that was tried, and the name of the chosen one.

    `references` are int8 versions of the dense model. They are for comparison and cannot be chosen.
    """

    limit: float  # largest drop of top-1, in percentage points, or of the metric
    allowed: int  # largest number of recipes to try
    images: int  # number of validation images
    batches: tuple[int, ...]
    points: tuple[Point, ...]
    chosen: str
    references: tuple[Point, ...] = ()
    metric: str | None = None  # the name of the user's own metric, in whose units drops and the limit are

    @property
    def measure(self) -> str:
        """What drops: the metric, or top-1 in percentage points."""
        return "top-1 in percentage points" if self.metric is None else self.metric

    @property
    def unit(self) -> str:
        """The unit after the number of a drop."""
        return " points" if self.metric is None else ""

    def as_fast(self) -> tuple[str, ...]:
        """Names of the other recipes that hold and whose speed interval overlaps that of the chosen one."""
        if not self.batches:
            return ()  # nothing was timed
        low, high = next(point for point in self.points if point.name == self.chosen).speed_interval
        others = [point for point in self.points if point.holds and point.name != self.chosen]
        return tuple(p.name for p in others if p.speed_interval[0] <= high and low <= p.speed_interval[1])
