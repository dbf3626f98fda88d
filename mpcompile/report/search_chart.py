"""Chart of accuracy against speed: the recipes that a search tried, beside the dense model and its int8 versions."""

from collections.abc import Sequence

from mpcompile.report.chart import Chart, Dot, Label, Line, Mark, Number, Scale, ticks, x_axis, y_axis
from mpcompile.report.search_schema import Point, Tuning

WIDE, HIGH = 1000.0, 300.0
LEFT, TOP, BOTTOM = 60.0, 14.0, 258.0
SHOWN_LIMITS = 5  # the y axis ends at 5 times the limit; points that lost more are drawn at its lower edge


def tuning(found: Tuning) -> Chart:
    """The chart of a search. Recipes are labelled by their row in the table, and the chosen one by its name."""
    labels = [point.name if point.name == found.chosen else str(n) for n, point in enumerate(found.points, 1)]
    least = 0.2 if found.metric is None else found.limit or 1e-3
    lowest = -max(SHOWN_LIMITS * found.limit, 5 * least)
    speed = "speedup over dense" if found.batches else "dense multiply-accumulates / remaining ones"
    chart = accuracy_speed(
        found.points,
        labels,
        found.references,
        limit=found.limit,
        lowest=lowest,
        speed=speed,
        chosen=found.chosen,
        measure=found.measure,
        unit=found.unit,
        least=least,
    )
    description = f"{chart.description} Chosen: {found.chosen}; the limit is {found.limit:g}{found.unit}."
    return Chart(chart.width, chart.height, chart.title, description, chart.marks)


def accuracy_speed(
    points: Sequence[Point],
    labels: Sequence[str],
    references: Sequence[Point] = (),
    *,
    limit: float | None = None,
    lowest: float,
    speed: str,
    chosen: str = "",
    measure: str = "top-1 in percentage points",
    unit: str = " points",
    least: float = 0.2,
) -> Chart:
    """One dot for each model: x is its speed, y its change of `measure`, in `unit`. Dense is at (1, 0).

    Lines through the dots are 95 % intervals of the speed. `labels` has one text for each of `points`; `references` are
    labelled with their names. Points that hold are dark, `chosen` is labelled in bold, and a red line marks the limit.
    The y axis ends between `lowest` and -`least`. `speed` is the text below the x axis.
    """
    measured = [(point, label) for point, label in zip(points, labels, strict=True) if point.drop is not None]
    compared = [point for point in references if point.drop is not None]
    everyone = [*(point for point, _ in measured), *compared]
    changes = [_change(point) for point in everyone]
    bottom = max(lowest, min([-1.2 * (limit or 0.0), -least, *changes])) * 1.05
    highest = max([least / 2, *changes])
    up = Scale(bottom, highest + 0.1 * (highest - bottom), BOTTOM, TOP)  # room for the labels above the dots
    speeds = [1.0, *(end for point in everyone for end in point.speed_interval)]
    spread = max(speeds) - min(speeds) or 1.0
    across = Scale(min(speeds) - 0.06 * spread, max(speeds) + 0.06 * spread, LEFT, WIDE - 14)
    marks = x_axis(across, ticks(across.low, across.high, 8), TOP, BOTTOM)
    marks += y_axis(up, ticks(up.low, up.high, 5), LEFT, WIDE, "{:+g}")
    if limit is not None:
        marks.append(Line(((LEFT, up(-limit)), (WIDE, up(-limit))), "red", f"limit: {limit:g}{unit}"))
        marks.append(Label(WIDE - 4, up(-limit) - 5, f"limit {limit:g}", "end", "tick"))
    marks.append(Dot(across(1.0), up(0.0), "dense", "the dense model", 5))
    marks.append(Label(across(1.0), up(0.0) - 9, "dense", "middle", "strong"))
    for point in compared:
        marks += _point(across, up, point, point.name, "dense", "label", unit)
    for point, label in measured:
        bold = "strong" if point.name == chosen else "label"
        marks += _point(across, up, point, label, "compressed" if point.holds else "other", bold, unit)
    marks.append(Label(WIDE, HIGH - 8, speed, "end", "tick"))
    title = f"Change of {measure}, against {speed}"
    texts = (f"{point.name} {_changed(point, unit)} at {point.speed:.2f}" for point in everyone)
    return Chart(WIDE, HIGH, title, f"{'; '.join(texts)}.", tuple(marks))


def _point(across: Scale, up: Scale, point: Point, label: str, style: str, label_style: str, unit: str) -> list[Mark]:
    """The dot of a model, the 95 % interval of its speed and its label; an arrow marks a dot below the y axis."""
    below = _change(point) < up.low
    tooltip = f"{point.name}: {_changed(point, unit)}, {point.speed:.2f}" + (", below the axis" if below else "")
    dot = Dot(across(point.speed), up(max(_change(point), up.low)), style, tooltip)
    low, high = point.speed_interval
    interval = Line(((across(low), dot.y), (across(high), dot.y)), "axis", tooltip)
    text = label + (" ↓" if below else "")
    return [interval, dot, Label(dot.x, dot.y - 8, text, "middle", label_style)]


def _changed(point: Point, unit: str) -> str:
    """The change with its unit."""
    return f"{_change(point):+.2f}{unit}" if unit else f"{_change(point):+.4g}"


def _change(point: Point) -> Number:
    """The change of accuracy or of the metric; negative is a loss."""
    return 0.0 if point.drop is None else -point.drop
