"""`mpcompile explain`: why a layer of an output folder is as it is, in plain sentences or JSON."""

import json
from typing import Annotated

import typer

from mpcompile.cli.app import Command, app, epilog_of
from mpcompile.cli.completed_values import layers
from mpcompile.cli.options import FolderArgument, JsonOption


@app.command("explain", cls=Command, epilog=epilog_of("explain"))
def explain_command(
    folder: FolderArgument,
    layer: Annotated[
        str | None,
        typer.Argument(
            metavar="[LAYER]",
            help="Name of a layer, or a shell pattern such as 'blocks.0.*'. Without it, all layers are listed.",
            autocompletion=layers,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say why a layer of an output folder is as it is.

    Tells its pattern and who chose it, its spectrum, refit error, number format, kernel and loss. Reads report.json and
    runs nothing.
    """
    from mpcompile.driver.read_report import read_checked_report
    from mpcompile.report.explained_layer import explain, layers_named, one_line_each

    report = read_checked_report(folder)
    if layer is None:
        lines = one_line_each(report)
        if as_json:
            typer.echo(json.dumps(dict(lines), indent=2, ensure_ascii=False))
            return
        width = max((len(name) for name, _ in lines), default=0)
        for name, text in lines:
            typer.echo(f"{name:{width}}  {text}")
        return
    found = [explain(report, row) for row in layers_named(report, layer)]
    if as_json:
        rows = [{"layer": each.layer, "sentences": [list(pair) for pair in each.sentences]} for each in found]
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    for n, each in enumerate(found):
        if n:
            typer.echo()
        for topic, text in each.sentences:
            typer.echo(f"{topic + ':':<10}{text}")
