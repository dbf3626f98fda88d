"""A chart as a value: bars, lines, dots and labels in the units of its box, for a template to draw as SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Number = float | int  # what is checked at run time takes no int for a float


@dataclass(frozen=True, slots=True)
class Bar:
    """A rectangle; `kind` is its class in the style sheet, `about` what is told of it where one points at it."""

    x: Number
    y: Number
    width: Number
    height: Number
    kind: str
    about: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """A stroke through two or more points."""

    points: tuple[tuple[Number, Number], ...]
    kind: str
    about: str = ""


@dataclass(frozen=True, slots=True)
class Dot:
    """A round mark."""

    x: Number
    y: Number
    kind: str
    about: str = ""
    radius: Number = 3.5


@dataclass(frozen=True, slots=True)
class Label:
    """A text; `anchor` is start, middle or end of it."""

    x: Number
    y: Number
    text: str
    anchor: str = "start"
    kind: str = "label"


@dataclass(frozen=True, slots=True)
class Chart:
    """A whole picture: its box, its marks, back to front, and in words what it shows."""

    width: Number
    height: Number
    title: str
    words: str
    bars: tuple[Bar, ...] = ()
    lines: tuple[Line, ...] = ()
    dots: tuple[Dot, ...] = ()
    labels: tuple[Label, ...] = ()


@dataclass(frozen=True, slots=True)
class Scale:
    """Numbers from `low` to `high` onto places from `start` to `end`."""

    low: Number
    high: Number
    start: Number
    end: Number

    def __call__(self, value: Number) -> Number:
        """The place of a number."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def ticks(low: Number, high: Number, count: int = 5) -> tuple[Number, ...]:
    """Round numbers from `low` to `high`, about so many: multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(n * step for n in range(first, last + 1))


def across(
    scale: Scale, values: Sequence[Number], top: Number, bottom: Number, spelling: str = "{:g}"
) -> tuple[list[Line], list[Label]]:
    """The grid and the numbers of a horizontal axis at `bottom`."""
    lines = [Line(((scale(v), top), (scale(v), bottom)), "grid") for v in values]
    return lines, [Label(scale(v), bottom + 15, spelling.format(v), "middle", "tick") for v in map(_clean, values)]


def upward(
    scale: Scale, values: Sequence[Number], left: Number, right: Number, spelling: str = "{:g}"
) -> tuple[list[Line], list[Label]]:
    """The grid and the numbers of a vertical axis at `left`."""
    lines = [Line(((left, scale(v)), (right, scale(v))), "grid") for v in values]
    return lines, [Label(left - 6, scale(v) + 4, spelling.format(v), "end", "tick") for v in map(_clean, values)]


def _clean(value: Number) -> Number:
    """The number without the dust of binary fractions."""
    return float(f"{value:.6g}")
