"""The chart of a search: what each recipe tried loses, against how fast it is."""

from collections.abc import Sequence

from mpcompile.report.chart import Chart, Dot, Label, Line, Number, Scale, across, ticks, upward
from mpcompile.report.search_schema import Point, Tuning

WIDE, HIGH = 1000.0, 300.0
LEFT, TOP, BOTTOM = 60.0, 14.0, 258.0
SHOWN = 5  # limits deep is the picture; what lost more stands at its lower edge


def tuning(found: Tuning) -> Chart:
    """A dot a recipe, by its number in the table: to the right is faster, higher up is more accurate.

    The dense model is at 1 and 0; the line is the limit. Recipes that hold are filled, and the one taken is named.
    """
    points = [point for point in found.points if point.drop is not None]
    references = [point for point in found.references if point.drop is not None]
    everyone = [*points, *references]
    deepest = -max(SHOWN * found.limit, 1.0)
    gained = [-_drop(point) for point in everyone]
    up = Scale(max(deepest, min([-1.2 * found.limit, -0.2, *gained])) * 1.05, max([0.1, *gained]) * 1.2, BOTTOM, TOP)
    speeds = [1.0, *(point.speed for point in everyone)]
    spread = max(speeds) - min(speeds) or 1.0
    place = Scale(min(speeds) - 0.06 * spread, max(speeds) + 0.16 * spread, LEFT, WIDE)
    grid, numbers = across(place, ticks(place.low, place.high, 8), TOP, BOTTOM)
    levels, heights = upward(up, ticks(up.low, up.high, 5), LEFT, WIDE, "{:+g}")
    limit = Line(((LEFT, up(-found.limit)), (WIDE, up(-found.limit))), "null", f"limit: {found.limit:g} points")
    dots = [Dot(place(1.0), up(0.0), "dense", "the dense model", 5)]
    labels = [*numbers, *heights, Label(place(1.0) + 9, up(0.0) + 4, "dense", kind="strong")]
    labels.append(Label(WIDE - 4, up(-found.limit) - 5, f"limit {found.limit:g}", "end", "tick"))
    for number, point in enumerate(found.points, 1):
        if point.drop is not None:
            dot = _dot(place, up, point, "compressed" if point.holds else "other")
            named = point.name == found.chosen
            dots.append(dot)
            text = (point.name if named else str(number)) + _beyond(up, point)
            labels.append(Label(dot.x + 7, dot.y + 4, text, kind="strong" if named else "label"))
    for point in references:
        dot = _dot(place, up, point, "dense")
        dots.append(dot)
        labels.append(Label(dot.x + 7, dot.y + 4, point.name + _beyond(up, point)))
    what = "times as fast as dense" if found.batches else "dense multiply-accumulates over those left"
    title = f"Points of top-1 gained or lost on validation images, against {what}"
    labels.append(Label(WIDE, HIGH - 8, what, "end", "tick"))
    return Chart(WIDE, HIGH, title, _words(everyone, found), (), (*grid, *levels, limit), tuple(dots), tuple(labels))


def _drop(point: Point) -> Number:
    return 0.0 if point.drop is None else point.drop


def _dot(place: Scale, up: Scale, point: Point, kind: str) -> Dot:
    told = f"{point.name}: {-_drop(point):+.2f} points, {point.speed:.2f}"
    told += ", below the picture" if _beyond(up, point) else ""
    return Dot(place(point.speed), up(max(-_drop(point), up.low)), kind, told)


def _beyond(up: Scale, point: Point) -> str:
    """An arrow where a point lies below the picture."""
    return " ↓" if -_drop(point) < up.low else ""


def _words(points: Sequence[Point], found: Tuning) -> str:
    told = "; ".join(f"{point.name} {-_drop(point):+.2f} points at {point.speed:.2f}" for point in points)
    return f"{told}. Taken: {found.chosen}; the limit is {found.limit:g} points."
