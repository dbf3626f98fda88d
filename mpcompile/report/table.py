"""Table: cells that Markdown, HTML and the console show in the same way.

Each cell with a number has its `key`: the jq expression that reads the number from report.json (or bench.json).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mpcompile.measure.layer_verdict import LayerVerdict

YES_NO = {True: "yes", False: "no", None: "not known"}


@dataclass(frozen=True, slots=True)
class Cell:
    """A text, and for a number its value and its origin.

    `value` is the number that columns are sorted by; `key` the jq expression that reads it from report.json; `file` a
    file of the output folder that the cell links to.
    """

    text: str = ""
    value: float | None = None
    key: str | None = None
    file: str | None = None


@dataclass(frozen=True, slots=True)
class Column:
    """The header of a column; `about` explains it if the name is not enough."""

    name: str
    numeric: bool = False
    about: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Columns and rows of cells; `key` is the path of the table's data in report.json."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    key: str

    def texts(self) -> list[tuple[str, ...]]:
        """The texts of each row, without the header."""
        return [tuple(cell.text for cell in row) for row in self.rows]

    def markdown(self) -> str:
        """The table as Markdown. Cell texts are escaped, so that a name can neither end its cell nor open a tag."""
        header, *rows = (_escaped(line) for line in [[column.name for column in self.columns], *self.texts()])
        lines = [f"| {' | '.join(line)} |" for line in (header, *rows)]
        return "\n".join([lines[0], f"|{'---|' * len(header)}", *lines[1:]])


def _escaped(line: Sequence[str]) -> list[str]:
    return [" ".join(text.split()).replace("|", "\\|").replace("<", "&lt;") for text in line]


def columns(*names: str, numbers: Sequence[str] = ()) -> tuple[Column, ...]:
    """Columns with these names; those also in `numbers` are numeric."""
    return tuple(Column(name, name in numbers) for name in names)


def number(value: float | int | None, form: str, key: str, scale: float | int = 1.0) -> Cell:
    """A cell with `scale * value` in the format string `form`; an empty cell if the value is None."""
    return Cell() if value is None else Cell(form.format(scale * value), float(value), key)


def verdict_table(verdicts: Sequence[LayerVerdict]) -> Table:
    """One row for each masked layer: whether it is eligible for a sparse kernel, whether one runs it, times, reason."""
    rows = []
    for n, row in enumerate(verdicts):
        key = f".verdicts[{n}]"
        rows.append(
            (
                Cell(row.layer),
                Cell(row.pattern),
                Cell(row.op),
                Cell(YES_NO[row.eligible]),
                Cell(YES_NO[row.chosen]),
                number(row.dense_ms, "{:.4f}", f"{key}.dense_ms"),
                number(row.sparse_ms, "{:.4f}", f"{key}.sparse_ms"),
                Cell(row.reason),
            )
        )
    names = (
        "masked layer",
        "pattern",
        "operator",
        "eligible",
        "sparse kernel",
        "ms, kernels off",
        "ms, kernels on",
        "reason",
    )
    return Table(columns(*names, numbers=("ms, kernels off", "ms, kernels on")), tuple(rows), ".verdicts")
