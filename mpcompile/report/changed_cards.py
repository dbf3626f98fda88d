"""The example images whose decision changed, as cards: the thumbnail, and what each model decided."""

from dataclasses import dataclass

from mpcompile.report.schema import Report
from mpcompile.report.table import Cell, Table, columns, number

KEY = ".comparison.examples"


@dataclass(frozen=True, slots=True)
class ChangedCard:
    """One image: the data URI of its picture, if there is one, and facts with their names."""

    picture: str | None
    description: str
    facts: tuple[tuple[str, Cell], ...]


def changed_cards(report: Report) -> tuple[ChangedCard, ...]:
    """One card for each example of the report."""
    table = changed_table(report)
    names = [column.name for column in table.columns]
    examples = report.comparison.examples if report.comparison else ()
    return tuple(
        ChangedCard(example.thumbnail, f"held-out image {example.index}", tuple(zip(names, row, strict=True)))
        for example, row in zip(examples, table.rows, strict=True)
    )


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
            number(example.dense_margin, "{:.3f}", f"{key}.dense_margin"),
            Cell(_name(report, example.compressed)),
            number(example.compressed_margin, "{:.3f}", f"{key}.compressed_margin"),
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
