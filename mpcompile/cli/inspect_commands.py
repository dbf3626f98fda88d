"""The read-only commands: `verify`, `doctor`, `passes` and `schema`."""

import json
from collections.abc import Sequence
from dataclasses import MISSING, Field, asdict, fields
from enum import StrEnum
from typing import Annotated, Any

import typer

from mpcompile.cli.app import Command, app, epilog_of
from mpcompile.cli.console import configure_logging, progress, show_times
from mpcompile.cli.model_options import (
    MODELS,
    AllowPickleOption,
    ArchArgOption,
    ArchOption,
    InputSizeOption,
    LeafOption,
    OutputNameOption,
    PreprocessOption,
    PretrainedOption,
)
from mpcompile.cli.options import FolderArgument, HeadOption, JsonOption, QuietOption
from mpcompile.cli.parse import head as parsed_head
from mpcompile.cli.parse import request_of
from mpcompile.errors import UsageError


class Schema(StrEnum):
    """The formats that `mpcompile schema` describes."""

    RECIPE = "recipe"
    REPORT = "report"


@app.command(cls=Command, epilog=epilog_of("verify"))
def verify(
    folder: FolderArgument,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Check that every mask holds in the files of an output folder and that no file has changed."""
    from mpcompile.driver.artifact import Artifact
    from mpcompile.report.layer_counts import weight_owners
    from mpcompile.report.report_hashes import is_protected

    artifact = Artifact.open(folder)
    rows = artifact.verify()
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=2))
    elif not quiet:
        owners = weight_owners(artifact.report.layers)
        masks = len({owners.get(row.layer, row.layer) for row in rows})
        typer.echo(f"{masks} masks hold in {artifact.onnx}, and every file has the SHA-256 that report.json lists")
    if not is_protected(artifact.folder):
        typer.echo(
            "mpcompile: the folder has no report.sha256, so edits of report.json, report.md and report.html cannot be "
            "noticed; compile again to protect them",
            err=True,
        )


@app.command(cls=Command, epilog=epilog_of("doctor"))
def doctor(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help=f"With --data: {MODELS[0].lower()}{MODELS[1:]}"),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Labelled images. Try the usual preprocessings of MODEL on up to 200 of them."),
    ] = None,
    head: HeadOption = None,
    arch: ArchOption = None,
    arch_arg: ArchArgOption = None,
    pretrained: PretrainedOption = False,
    allow_pickle: AllowPickleOption = False,
    input_size: InputSizeOption = None,
    preprocess: PreprocessOption = None,
    leaf: LeafOption = None,
    output_name: OutputNameOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show what works on this machine, or which preprocessing of images gives MODEL its accuracy."""
    configure_logging(0, quiet)
    if (model is None) != (data is None):
        raise UsageError("doctor tries preprocessings with a model and images; give both MODEL and --data, or neither")
    if model is not None and data is not None:
        from mpcompile.cli.tables import show_trials
        from mpcompile.driver.preprocessing_trials import try_preprocessings

        request = request_of(
            model, arch, arch_arg, pretrained, allow_pickle, input_size, None, None, leaf, preprocess,
            output_name=output_name,
        )  # fmt: skip
        with progress(quiet or as_json) as observe:
            trials = try_preprocessings(request, data, observe, head=parsed_head(head))
        if as_json:
            typer.echo(json.dumps(asdict(trials), indent=2))
        elif not quiet:
            show_trials(trials)
            show_times(observe)
        return
    from mpcompile.cli.tables import show_findings
    from mpcompile.driver.doctor import examine

    findings = examine()
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    elif not quiet:
        show_findings(findings)


@app.command(cls=Command, epilog=epilog_of("passes"))
def passes(as_json: JsonOption = False) -> None:
    """List the passes that a recipe can name, with their parameters and defaults."""
    from mpcompile.driver.run_plan import known

    found = known()
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "effect": str(kind.effect),
            "does": ((kind.__doc__ or "").strip().splitlines() or [""])[0],
            "parameters": {field.name: default_as_yaml(field) for field in fields(kind)},
            "from": found.origins.get(f"pass {name}"),  # null: built in
        }
        for name, kind in found.passes.items()
    ]
    _print_warnings(found.broken)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        typer.echo(f"{row['name']} ({row['effect']}): {row['does']}")
        if row["from"]:
            typer.echo(f"    from {row['from']}")
        for name, default in row["parameters"].items():
            typer.echo(f"    {name} = {default}")


@app.command(cls=Command, epilog=epilog_of("schema"))
def schema(
    of: Annotated[
        Schema,
        typer.Argument(metavar="recipe|report", help="Format to describe. [default: recipe]", show_default=False),
    ] = Schema.RECIPE,
) -> None:
    """Print the JSON Schema of recipes (for editors) or of report.json (for programs that read it)."""
    from mpcompile.driver.run_plan import known, recipe_schema
    from mpcompile.report.schema import report_schema

    if of is Schema.REPORT:
        typer.echo(json.dumps(report_schema(), indent=2))
        return
    found = known()
    _print_warnings(found.broken)
    typer.echo(json.dumps(recipe_schema(found), indent=2))


def _print_warnings(sentences: Sequence[str]) -> None:
    """Prints one line on standard error for each installed pass or runtime that cannot be used.

    This is not an error, since the command does not name any of them.
    """
    for sentence in sentences:
        typer.echo(f"mpcompile: {' '.join(sentence.split())}", err=True)


def default_as_yaml(field: Field[Any]) -> str:
    """The default value of a pass's parameter, written as in a recipe; `(required)` if it has none."""
    if field.default_factory is not MISSING:
        return _as_yaml(field.default_factory())
    return "(required)" if field.default is MISSING else _as_yaml(field.default)


def _as_yaml(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
