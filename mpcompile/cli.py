"""The command line: text -> values -> front door -> console."""

import json
import signal
import sys
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mpcompile.console import configure_logging, progress, show_artifact, show_findings, show_preview
from mpcompile.errors import AccuracyError, MpcompileError, UsageError

EXIT_CODES = """
Exit codes: 0 done; 2 wrong usage or recipe; 3 model or images could not be loaded, or the model not captured;
4 a pass failed; 5 outputs differ or a mask is violated; 6 an accuracy gate failed (the folder is written);
7 a runtime is missing or could not build; 1 anything else.
"""


class CompileByDefault(TyperGroup):
    """`mpcompile MODEL …` is `mpcompile compile MODEL …`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Puts the verb in where the first word is neither a verb nor an option of the whole."""
        own = {option for parameter in self.get_params(ctx) for option in parameter.opts}
        if args and args[0] not in self.commands and args[0] not in own:
            args = ["compile", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=CompileByDefault,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    help="Compress a trained PyTorch vision model to N:M sparsity, ship it as ONNX, and show the evidence.\n\n"
    "`mpcompile MODEL --pattern 2:4 -o OUT` is short for `mpcompile compile MODEL …`.",
    epilog=EXIT_CODES,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("mpcompile"))
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Options of the whole command."""


JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else there.")]
VerboseOption = Annotated[int, typer.Option("--verbose", "-v", count=True, help="Say more; twice: everything.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no table; errors only.")]


@app.command("compile", epilog=EXIT_CODES)
def compile_command(
    model: Annotated[str, typer.Argument(help="A file of weights, timm:NAME, or pkg.mod:factory.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The folder to write.")] = None,
    pattern: Annotated[
        str | None, typer.Option(help="N:M, N kept of every M; 2:4x4: four rows share one pattern.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="The runtime: ort or eager. [default: ort]")] = None,
    data: Annotated[Path | None, typer.Option(help="A folder of images, or an .npz file.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="Mask these layers too (shell pattern on names).")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Keep these layers dense (shell pattern on names).")] = None,
    criterion: Annotated[
        str | None, typer.Option(help="How weights are chosen: magnitude. [default: magnitude]")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 or fp16, written into the graph. [default: fp32]")] = None,
    batch: Annotated[str | None, typer.Option(help="A fixed batch size, or dynamic. [default: dynamic]")] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX opset, 18 to 23. [default: 20]")] = None,
    max_drop: Annotated[float | None, typer.Option(help="Fail (6) where top-1 falls by more points.")] = None,
    calibration: Annotated[int | None, typer.Option(help="Images for calibration. [default: 256]")] = None,
    held_out: Annotated[int | None, typer.Option(help="Images to evaluate on. [default: all]")] = None,
    seed: Annotated[int | None, typer.Option(help="Chooses the images. [default: 0]")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the runtime. [default: its choice]")] = None,
    arch: Annotated[
        str | None, typer.Option(help="Architecture of a file of weights: timm name or pkg.mod:factory.")
    ] = None,
    arch_arg: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="An argument of the architecture.")
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="With timm:NAME, fetch the hub's weights.")] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Run the code in a pickled model. Trust it first.")
    ] = False,
    input_size: Annotated[
        str | None, typer.Option(metavar="CxHxW", help="Shape of an image, such as 3x224x224.")
    ] = None,
    mean: Annotated[str | None, typer.Option(metavar="M,M,M", help="Mean of pixels in [0, 1], a channel each.")] = None,
    std: Annotated[str | None, typer.Option(metavar="S,S,S", help="Standard deviation likewise.")] = None,
    leaf: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Keep this module whole when tracing.")] = None,
    config: Annotated[Path | None, typer.Option(help="A recipe (YAML); options override it.")] = None,
    save_config: Annotated[Path | None, typer.Option(help="Write the resolved recipe here.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done; write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an output folder of mpcompile.")] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Compress MODEL, check every step, and write the output folder."""
    configure_logging(verbose, quiet)
    from mpcompile.artifact import Artifact
    from mpcompile.compile import compile, preview, stages
    from mpcompile.load import Request
    from mpcompile.recipe import Recipe, overridden, read_recipe

    recipe = overridden(
        read_recipe(config) if config else Recipe(),
        mask={"pattern": pattern, "criterion": criterion, "include": include, "exclude": exclude},
        top={"target": target, "precision": precision, "batch": _batch(batch), "opset": opset},
        nested={
            "data": {"calibration": calibration, "held_out": held_out, "seed": seed},
            "bench": {"threads": threads},
            "gates": {"max_drop": max_drop},
        },
    )
    request = Request(
        model=model,
        arch=arch,
        arch_args=dict(_key_value(text) for text in arch_arg or ()),
        pretrained=pretrained,
        allow_pickle=allow_pickle,
        input_size=_size(input_size),
        mean=_numbers(mean, "--mean"),
        std=_numbers(std, "--std"),
        leaves=tuple(leaf or ()),
    )
    if save_config:
        _write_text(save_config, recipe.to_yaml())
    if dry_run:
        show_preview(preview(request, recipe), recipe, as_json)
        return
    if output is None:
        raise UsageError("--output is missing; name the folder to write, or use --dry-run")
    failure = None
    try:
        with progress(stages(recipe), quiet or as_json) as observe:
            artifact = compile(request, recipe, data=data, output=output, force=force, observe=observe)
    except AccuracyError as error:  # the folder is written, and is shown before the command fails
        failure, artifact = error, Artifact.open(output)
    if as_json:
        typer.echo(artifact.report.model_dump_json(indent=2))
    elif not quiet:
        show_artifact(artifact)
    if failure:
        raise failure


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="An output folder.")],
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Prove again that each mask is in the files of an output folder, and that the files are the ones proven."""
    from mpcompile.artifact import Artifact

    artifact = Artifact.open(folder)
    rows = artifact.verify()
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=2))
    elif not quiet:
        typer.echo(f"{len(rows)} masks hold in {artifact.onnx}, and every file is the one that was proven")


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what works on this machine, what is missing, and how to get it."""
    from mpcompile.doctor import examine

    findings = examine()
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
        return
    show_findings(findings)


@app.command()
def passes(as_json: JsonOption = False) -> None:
    """List the passes that a recipe may name, with their parameters."""
    from mpcompile.compile import PASSES

    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "effect": str(kind.effect),
            "does": (kind.__doc__ or "").strip().splitlines()[0],
            "parameters": {field.name: str(field.default) for field in fields(kind)},  # type: ignore[arg-type]
        }
        for name, kind in PASSES.items()
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        typer.echo(f"{row['name']} ({row['effect']}): {row['does']}")
        for name, default in row["parameters"].items():
            typer.echo(f"    {name} = {default}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from mpcompile.compile import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2))


# ---- text -> values


def _batch(text: str | None) -> str | int | None:
    if text is None or text == "dynamic":
        return text
    if not text.isdecimal():
        raise UsageError(f"--batch {text!r} is neither a number nor dynamic")
    return int(text)


def _size(text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdecimal() and part.isascii() and int(part) for part in parts):
        raise UsageError(f"--input-size {text!r} is not CxHxW, such as 3x224x224")
    channels, height, width = map(int, parts)
    return channels, height, width


def _numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text!r} is not a number a channel, such as 0.5,0.5,0.5") from None


def _key_value(text: str) -> tuple[str, Any]:
    """KEY=VALUE, the value read as JSON where it is JSON and as text where not."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"--arch-arg {text!r} is not KEY=VALUE, such as img_size=384")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error


def _stop(signum: int, frame: object) -> None:
    raise SystemExit(128 + signum)  # unwinds, so that the half-written folder is removed


def main() -> None:
    """Runs the command; a failure is one line on standard error and an exit code."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        app()
    except MpcompileError as error:
        typer.echo(f"mpcompile: {' '.join(str(error).split())}", err=True)
        raise SystemExit(error.exit_code) from None
    except Exception as error:
        if {"-v", "-vv", "--verbose"} & set(sys.argv):
            raise
        text = f"unforeseen {type(error).__name__}: {' '.join(str(error).split())}"
        typer.echo(f"mpcompile: {text} (-v shows where; please report it)", err=True)
        raise SystemExit(1) from None
