"""The example images whose decision changed, as cards: the thumbnail, and what each model decided."""

from dataclasses import dataclass

from mpcompile.report.schema import Report
from mpcompile.report.table import Cell, Table, columns, number

KEY = ".comparison.examples"


@dataclass(frozen=True, slots=True)
class ChangedCard:
    """One image: the data URI of its picture, if there is one, its number, and the decisions.

    A decision is who made it, its name, and its margin; the label has none.
    """

    picture: str | None
    number: Cell
    decisions: tuple[tuple[str, Cell, Cell | None], ...]


def changed_cards(report: Report) -> tuple[ChangedCard, ...]:
    """One card for each example of the report."""
    examples = report.comparison.examples if report.comparison else ()
    found = []
    for example, (index, *cells) in zip(examples, changed_table(report).rows, strict=True):
        decisions = [("dense", cells[0], cells[1]), ("compressed", cells[2], cells[3])]
        label = [("label", cell, None) for cell in cells[4:]]
        found.append(ChangedCard(example.thumbnail, index, (*decisions, *label)))
    return tuple(found)


def changed_table(report: Report) -> Table:
    """One row for each example: the decisions of both models with their margins, and the label."""
    c = report.comparison
    examples = c.examples if c else ()
    labelled = any(example.label is not None for example in examples)
    rows = []
    for n, example in enumerate(examples):
        key = f"{KEY}[{n}]"
        row = [
            number(example.index, "{:.0f}", f"{key}.index"),
            Cell(_name(report, example.dense)),
            number(example.dense_margin, "{:.3g}", f"{key}.dense_margin"),
            Cell(_name(report, example.compressed)),
            number(example.compressed_margin, "{:.3g}", f"{key}.compressed_margin"),
        ]
        if labelled:
            row.append(Cell("" if example.label is None else _name(report, example.label)))
        rows.append(tuple(row))
    numbers = ("held-out image", "dense margin", "compressed margin")
    names = (numbers[0], "dense", numbers[1], "compressed", numbers[2], *(("label",) if labelled else ()))
    return Table(columns(*names, numbers=numbers), tuple(rows), KEY)


def _name(report: Report, decision: int) -> str:
    """The name of a class, or its number."""
    labels = report.model.labels
    return labels[decision] if decision < len(labels) else str(decision)
