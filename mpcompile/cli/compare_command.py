"""`mpcompile compare`: output folders side by side, as a table, JSON or one HTML page; checks conditions."""

from pathlib import Path
from typing import Annotated

import typer

from mpcompile.cli.app import Command, app, epilog_of
from mpcompile.cli.choices import METRICS, completion
from mpcompile.cli.console import configure_logging
from mpcompile.cli.options import JsonOption, QuietOption


@app.command("compare", cls=Command, epilog=epilog_of("compare", codes=True))
def compare_command(
    folders: Annotated[
        list[Path], typer.Argument(metavar="FOLDER", help="Output folders of `mpcompile compile`, one or more.")
    ],
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-if",
            metavar="CONDITION",
            help="Fail (exit code 6) if this is true for a folder: 'top1 < dense - 0.5' is half a percentage point. "
            f"'speedup@8 < 1.2' names a batch size. Metrics: {'; '.join(METRICS)}. One that was not measured fails. "
            "Can be repeated.",
            autocompletion=completion(METRICS),
        ),
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Print a second table with one row for each layer.")] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also write the comparison as one HTML page.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare output folders with each other and with their dense models.

    Shows accuracy, agreement, speed, size and proofs. Reads report.json of each folder and runs nothing. If the runs
    cannot be compared, it says in what and why: other dense models, images, machines or versions.
    """
    configure_logging(0, quiet)
    from mpcompile.cli.compared_output import show_comparison, show_failures
    from mpcompile.driver.compare_runs import compare_runs, require_conditions, write_page

    found = compare_runs(folders, fail_if or ())
    if html:
        write_page(found, html)
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    elif not quiet:
        show_comparison(found, layers, html)
    show_failures(found)
    require_conditions(found)
