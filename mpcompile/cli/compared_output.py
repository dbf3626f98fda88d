"""A comparison of runs as tables and sentences on standard output, and failed conditions on standard error.

`mpcompile compare` imports this module when it runs: it imports rich.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table as RichTable

from mpcompile.report.compared_page import caption_of, title_of
from mpcompile.report.compared_schema import ComparedRuns
from mpcompile.report.compared_tables import layers_table, runs_table
from mpcompile.report.table import Table

PIPED_WIDTHS = (120, 400)  # least and most characters of a table that is not shown on a terminal


def show_comparison(found: ComparedRuns, layers: bool, page: Path | None) -> None:
    """Prints what cannot be compared, the table of runs, with `layers` that of layers, and what else to know."""
    tables = [rich_table(runs_table(found), title_of(found))]
    if layers:
        tables.append(rich_table(layers_table(found), "layers"))
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else _widest(tables))
    for difference in found.differences:
        console.print(f"† {difference.sentence}", soft_wrap=True)
    for run in found.runs:
        for warning in run.warnings:
            console.print(f"Warning: {run.name}: {warning}", soft_wrap=True)
    for table in tables:
        console.print(table)
    console.print(caption_of(found), soft_wrap=True)
    for remark in found.remarks:
        console.print(f"Note: {remark}", soft_wrap=True)
    if page:
        console.print(f"Written to {page}", soft_wrap=True)


def _widest(tables: Sequence[RichTable]) -> int:
    """The width at which no cell of these tables is folded, within PIPED_WIDTHS."""
    least, most = PIPED_WIDTHS
    console = Console(width=most)
    return max(least, *(console.measure(table).maximum for table in tables))


def show_failures(found: ComparedRuns) -> None:
    """Prints one line on standard error for each condition that is true or cannot be checked."""
    for row in found.conditions:
        if row.state != "holds":
            typer.echo(f"mpcompile: {' '.join(row.sentence.split())}", err=True)


def rich_table(found: Table, title: str) -> RichTable:
    """A table of a report for the terminal."""
    table = RichTable(title=title, title_justify="left")
    for column in found.columns:
        table.add_column(column.name, justify="right" if column.numeric else "left", overflow="fold")
    for row in found.texts():
        table.add_row(*row)
    return table
