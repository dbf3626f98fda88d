"""The commands that only look: `verify`, `doctor`, `passes` and `schema`."""

import json
from collections.abc import Sequence
from dataclasses import MISSING, Field, asdict, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from mpcompile.cli.app import app
from mpcompile.cli.console import (
    show_findings,
)
from mpcompile.cli.options import (
    JsonOption,
    QuietOption,
)


class Schema(StrEnum):
    """What a JSON Schema is printed of."""

    RECIPE = "recipe"
    REPORT = "report"


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="An output folder.")],
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Prove again that each mask is in the files of an output folder, and that the files are the ones proven."""
    from mpcompile.driver.artifact import Artifact

    artifact = Artifact.open(folder)
    rows = artifact.verify()
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=2))
    elif not quiet:
        typer.echo(f"{len(rows)} masks hold in {artifact.onnx}, and every file is the one that was proven")


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what works on this machine, what is missing, and how to get it."""
    from mpcompile.driver.doctor import examine

    findings = examine()
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
        return
    show_findings(findings)


@app.command()
def passes(as_json: JsonOption = False) -> None:
    """List the passes that a recipe may name, with their parameters."""
    from mpcompile.driver.run_plan import known

    found = known()
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "effect": str(kind.effect),
            "does": ((kind.__doc__ or "").strip().splitlines() or [""])[0],
            "parameters": {field.name: _default(field) for field in fields(kind)},
            "from": found.origins.get(f"pass {name}"),  # null: built in
        }
        for name, kind in found.passes.items()
    ]
    _tell_broken(found.broken)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        typer.echo(f"{row['name']} ({row['effect']}): {row['does']}")
        if row["from"]:
            typer.echo(f"    from {row['from']}")
        for name, default in row["parameters"].items():
            typer.echo(f"    {name} = {default}")


@app.command()
def schema(
    of: Annotated[
        Schema,
        typer.Argument(metavar="[recipe|report]", help="What it describes. [default: recipe]", show_default=False),
    ] = Schema.RECIPE,
) -> None:
    """Print the JSON Schema of recipes, for editors, or of report.json, for what reads it."""
    from mpcompile.driver.run_plan import known, recipe_schema
    from mpcompile.report.schema import report_schema

    if of is Schema.REPORT:
        typer.echo(json.dumps(report_schema(), indent=2))
        return
    found = known()
    _tell_broken(found.broken)
    typer.echo(json.dumps(recipe_schema(found), indent=2))


def _tell_broken(sentences: Sequence[str]) -> None:
    """What is installed and cannot be used: a line each on standard error, and no failure, since nobody named it."""
    for sentence in sentences:
        typer.echo(f"mpcompile: {' '.join(sentence.split())}", err=True)


def _default(field: Field[Any]) -> str:
    """The default of a pass's parameter as a recipe would have it."""
    if field.default_factory is not MISSING:
        return _spelt(field.default_factory())
    return "(required)" if field.default is MISSING else _spelt(field.default)


def _spelt(value: object) -> str:
    """A default as a recipe would have it."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
