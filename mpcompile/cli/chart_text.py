"""A chart of the report as text for a terminal: the same dots, lines and labels on a grid of characters."""

from dataclasses import dataclass, field

from rich.console import Console
from rich.text import Text

from mpcompile.report.chart import Chart, Dot, Label, Line, Number

UNITS_PER_ROW = 20.0  # of the height of a chart: the picture of a search takes 15 lines
LEAST_COLUMNS, MOST_COLUMNS = 40, 100
DOTS = {"compressed": ("●", "green"), "other": ("○", "red"), "dense": ("◆", "cyan")}
ASCII = {"●": "*", "○": "o", "◆": "#", "·": ".", "─": "-", "↓": "v"}
LINES = {"grid": ("·", "dim"), "red": ("─", "red"), "axis": ("─", "dim"), "error-bar": ("─", "dim")}


@dataclass(slots=True)
class _Characters:
    """Characters with their styles, and which cells have a dot or a label."""

    columns: int
    rows: int
    cells: dict[tuple[int, int], tuple[str, str]] = field(default_factory=dict)
    taken: set[tuple[int, int]] = field(default_factory=set)

    def put(self, row: int, column: int, text: str, style: str) -> None:
        """Writes a text that stays, from a column on; what lies outside the grid is cut off."""
        for n, character in enumerate(text):
            at = row, column + n
            if 0 <= row < self.rows and 0 <= at[1] < self.columns:
                self.cells[at] = character, style
                self.taken.add(at)

    def free(self, row: int, column: int, length: int) -> bool:
        """Whether a text of this length fits there without covering a dot or another label."""
        fits = 0 <= row < self.rows and column >= 0 and column + length <= self.columns
        return fits and not any((row, column + n) in self.taken for n in range(length))


def drawn_for(console: Console, chart: Chart) -> Text:
    """The chart as wide as a console, at most MOST_COLUMNS, in characters that its encoding has."""
    return drawn(chart, min(console.width, MOST_COLUMNS), console.encoding.startswith("utf"))


def drawn(chart: Chart, columns: int, utf8: bool = True) -> Text:
    """The chart with its title as text of this many columns, at least LEAST_COLUMNS.

    Bars are not drawn. Without `utf8` the text is ASCII.
    """
    columns = max(columns, LEAST_COLUMNS)
    rows = round(chart.height / UNITS_PER_ROW)
    grid = _Characters(columns, rows)

    def place(x: Number, y: Number) -> tuple[int, int]:
        return min(int(y / chart.height * rows), rows - 1), min(int(x / chart.width * columns), columns - 1)

    for mark in chart.marks:
        if isinstance(mark, Line) and mark.style in LINES:
            _draw_line(grid, place(*mark.points[0]), place(*mark.points[-1]), *LINES[mark.style])
    dots = [mark for mark in chart.marks if isinstance(mark, Dot)]
    for dot in dots:
        grid.put(*place(dot.x, dot.y), *DOTS[dot.style])
    for label in (mark for mark in chart.marks if isinstance(mark, Label)):
        _write_label(grid, label, *place(label.x, label.y))
    text = Text(f"{chart.title}\n", no_wrap=True)
    for row in range(rows):
        for column in range(columns):
            character, style = grid.cells.get((row, column), (" ", ""))
            text.append(character if utf8 else ASCII.get(character, character), style)
        text.append("\n")
    return text


def _draw_line(grid: _Characters, start: tuple[int, int], end: tuple[int, int], character: str, style: str) -> None:
    """A horizontal or vertical line."""
    for row in range(min(start[0], end[0]), max(start[0], end[0]) + 1):
        for column in range(min(start[1], end[1]), max(start[1], end[1]) + 1):
            grid.cells[row, column] = character, style


def _write_label(grid: _Characters, label: Label, row: int, column: int) -> None:
    """Writes a label at its place; above, beside or below it if a dot or another label is there."""
    length = len(label.text)
    start = column - {"start": 0, "middle": length // 2, "end": length - 1}[label.anchor]
    start = max(0, min(start, grid.columns - length))
    style = "bold" if label.style == "strong" else "dim" if label.style == "tick" else ""
    places = ((row, start), (row - 1, start), (row, column + 2), (row, column - length - 1), (row + 1, start))
    for at in places:
        if grid.free(*at, length):
            grid.put(*at, label.text, style)
            return
