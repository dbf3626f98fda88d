"""A table as a value, which Markdown, HTML and the console show alike.

A number knows where it comes from: `key` is what `jq` reads from report.json (or bench.json) to get it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mpcompile.measure.layer_verdict import LayerVerdict

SPELT = {True: "yes", False: "no", None: "not known"}


@dataclass(frozen=True, slots=True)
class Cell:
    """What is shown, the number behind it, and where both are from.

    `value` is what a column is sorted by; `key` an expression of jq that gives it; `file` another file of the output
    folder that the cell speaks of.
    """

    text: str = ""
    value: float | None = None
    key: str | None = None
    file: str | None = None


@dataclass(frozen=True, slots=True)
class Column:
    """The head of a column; `about` says what it means where the name alone does not."""

    name: str
    numeric: bool = False
    about: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells under their columns; `key` is where they stand in the report."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    key: str

    def markdown(self) -> str:
        """The table as Markdown, in which a name cannot end its cell or open a tag."""
        lines = [[column.name for column in self.columns], ["---"] * len(self.columns)]
        lines += [[cell.text for cell in row] for row in self.rows]
        lines[0], lines[2:] = _kept(lines[0]), [_kept(line) for line in lines[2:]]
        return "\n".join(f"| {' | '.join(line)} |" if line[0] != "---" else f"|{'---|' * len(line)}" for line in lines)


def _kept(line: Sequence[str]) -> list[str]:
    """Texts that stay within a cell of Markdown."""
    return [" ".join(text.split()).replace("|", "\\|").replace("<", "&lt;") for text in line]


def columns(*names: str, numbers: Sequence[str] = ()) -> tuple[Column, ...]:
    """Columns of these names; those among `numbers` are numeric."""
    return tuple(Column(name, name in numbers) for name in names)


def shown(value: float | int | None, spelling: str, key: str, scale: float | int = 1.0) -> Cell:
    """A number as `spelling` writes it, after multiplication with `scale`; an empty cell where there is none."""
    return Cell() if value is None else Cell(spelling.format(scale * value), float(value), key)


def verdict_table(verdicts: Sequence[LayerVerdict]) -> Table:
    """A row a masked layer: how far it came on its target."""
    rows = []
    for place, row in enumerate(verdicts):
        key = f".verdicts[{place}]"
        rows.append(
            (
                Cell(row.layer),
                Cell(row.pattern),
                Cell(row.op),
                Cell(SPELT[row.eligible]),
                Cell(SPELT[row.chosen]),
                shown(row.dense_ms, "{:.4f}", f"{key}.dense_ms"),
                shown(row.sparse_ms, "{:.4f}", f"{key}.sparse_ms"),
                Cell(row.reason),
            )
        )
    names = ("masked layer", "pattern", "operator", "eligible", "sparse kernel", "ms without", "ms with", "why")
    return Table(columns(*names, numbers=("ms without", "ms with")), tuple(rows), ".verdicts")
