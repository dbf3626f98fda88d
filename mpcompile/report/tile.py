"""Tile: one of the four main results of a report, with its judgement in a word."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mpcompile.report.table import Cell

Phrase = tuple[str | Cell, ...]  # texts without numbers, and cells
State = Literal["good", "bad", "unsure", "fact", "none"]


@dataclass(frozen=True, slots=True)
class Tile:
    """One of the four main results.

    Attributes:
        id: the last part of its element's id in the page.
        title: what was measured, and against what.
        state: the judgement, which chooses the colour: `good` and `bad` are significant differences or gates, `unsure`
            differs between cases, `fact` is measured or proven, and not judged, `none` was not measured.
        word: the judgement in words.
        figure: the main number; empty if nothing was measured.
        lines: further numbers and their intervals.
        todo: how to measure what is missing, as sentences; empty if nothing is.
    """

    id: str
    title: str
    state: State
    word: str
    figure: Phrase = ()
    lines: tuple[Phrase, ...] = ()
    todo: str = ""


def plain(phrase: Phrase) -> str:
    """A phrase as text."""
    return "".join(part.text if isinstance(part, Cell) else part for part in phrase)


def interval(ends: Sequence[float], form: str, key: str, scale: float = 1.0, order: tuple[int, int] = (0, 1)) -> Phrase:
    """The interval at `key` as a phrase such as `[1.33, 1.36]`: `scale` times its ends, of the given order."""
    sign = "" if scale == 1 else f"{scale:g} * "
    first, last = (Cell(form.format(scale * ends[i]), scale * ends[i], f"{sign}{key}[{i}]") for i in order)
    return "[", first, ", ", last, "]"
