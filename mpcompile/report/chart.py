"""Chart: bars, lines, dots and labels in user units of an SVG box; templates/macros.html.j2 draws them as inline SVG.

Not matplotlib, on purpose: its SVG backend takes about 65 ms of CPU a chart and 0.3 s to import, and all charts of a
report here take 3 ms together. Its markup is two to four times as large, and tooltips and dark mode have to be edited
into it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

Number = float | int  # the run-time type checks of the tests do not accept an int for a float


@dataclass(frozen=True, slots=True)
class Bar:
    """A rectangle. `style` is its class in chart.css, `tooltip` the text shown when the pointer is over it.

    A click on a bar with a `layer`, a number in network order, opens the details of that layer.
    """

    tag: ClassVar[str] = "rect"
    x: Number
    y: Number
    width: Number
    height: Number
    style: str
    tooltip: str = ""
    layer: int | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """A polyline through two or more points (x, y)."""

    tag: ClassVar[str] = "polyline"
    points: tuple[tuple[Number, Number], ...]
    style: str
    tooltip: str = ""


@dataclass(frozen=True, slots=True)
class Dot:
    """A circle around (x, y)."""

    tag: ClassVar[str] = "circle"
    x: Number
    y: Number
    style: str
    tooltip: str = ""
    radius: Number = 3.5


@dataclass(frozen=True, slots=True)
class Label:
    """A text whose start, middle or end (`anchor`) is at x and whose baseline is at y."""

    tag: ClassVar[str] = "text"
    x: Number
    y: Number
    text: str
    anchor: str = "start"
    style: str = "label"


Mark = Bar | Line | Dot | Label


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart: its size, its title, its content in words for screen readers, and its marks, back to front."""

    width: Number
    height: Number
    title: str
    description: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear map from the values `low` ... `high` to the coordinates `start` ... `end`."""

    low: Number
    high: Number
    start: Number
    end: Number

    def __call__(self, value: Number) -> Number:
        """The coordinate of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def ticks(low: Number, high: Number, count: int = 5) -> tuple[Number, ...]:
    """About `count` round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(float(f"{n * step:.6g}") for n in range(first, last + 1))  # 0.3, not 0.30000000000000004


def x_axis(scale: Scale, values: Sequence[Number], top: Number, bottom: Number, form: str = "{:g}") -> list[Mark]:
    """Vertical grid lines from `top` to `bottom` at the values, and the values as text below."""
    lines = [Line(((scale(v), top), (scale(v), bottom)), "grid") for v in values]
    return [*lines, *(Label(scale(v), bottom + 15, form.format(v), "middle", "tick") for v in values)]


def y_axis(scale: Scale, values: Sequence[Number], left: Number, right: Number, form: str = "{:g}") -> list[Mark]:
    """Horizontal grid lines from `left` to `right` at the values, and the values as text on the left."""
    lines = [Line(((left, scale(v)), (right, scale(v))), "grid") for v in values]
    return [*lines, *(Label(left - 6, scale(v) + 4, form.format(v), "end", "tick") for v in values)]


def column(scale: Scale, center: Number, width: Number, value: Number, style: str, tooltip: str) -> Bar:
    """An upright bar of the given width around `center`, from 0 to the value on a vertical scale."""
    return Bar(center - width / 2, scale(value), width, scale(0) - scale(value), style, tooltip)


def error_bar(scale: Scale, low: Number, high: Number, y: Number, tooltip: str) -> list[Mark]:
    """A horizontal error bar from `low` to `high` at y, with its two caps."""
    caps = (Line(((scale(end), y - 4), (scale(end), y + 4)), "error-bar") for end in (low, high))
    return [Line(((scale(low), y), (scale(high), y)), "error-bar", tooltip), *caps]
