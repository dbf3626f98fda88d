"""The record of a search as the tests want it: recipes with their drop and speed, measured at one batch size."""

from mpcompile.measure.timing import Speedup
from mpcompile.report.search_schema import Point, Tuning

LIMIT = 1.0  # points of top-1
ERROR = 0.2


def tried(name: str, drop: float, speed: float) -> Point:
    """A measured recipe whose speed interval is 3 % to each side."""
    interval = 0.97 * speed, 1.03 * speed
    return Point(name, 0.5, drop, ERROR, (Speedup(speed, interval, 15, "dense"),), drop + ERROR <= LIMIT)


def search_of(*points: Point, chosen: str = "", references: tuple[Point, ...] = ()) -> Tuning:
    return Tuning(LIMIT, 12, 512, (1,), points, chosen, references)
