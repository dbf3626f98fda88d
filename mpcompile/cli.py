"""The command line: text -> values -> front door -> console."""

import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import MISSING, Field, asdict, fields
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

import mpcompile.options as options  # by the module's name: its functions are called what parameters here are
from mpcompile.console import (
    configure_logging,
    progress,
    show_analysis,
    show_artifact,
    show_bench,
    show_findings,
    show_preview,
)
from mpcompile.errors import AccuracyError, MpcompileError, ResourceError, UsageError, one_line
from mpcompile.options import (
    AllowPickleOption,
    ArchArgOption,
    ArchOption,
    BudgetOption,
    CalibrationOption,
    DataOption,
    ExcludeOption,
    IncludeOption,
    InputSizeOption,
    JsonOption,
    LeafOption,
    MacsOption,
    MeanOption,
    ModelArgument,
    PatternOption,
    PermuteOption,
    PretrainedOption,
    QuietOption,
    SeedOption,
    ShareRowsOption,
    StdOption,
    StrictOption,
    TargetOption,
    TomeOption,
    VerboseOption,
)
from mpcompile.shortage import shortage

if TYPE_CHECKING:
    from mpcompile.load import Request

EXIT_CODES = """
Exit codes: 0 done; 2 wrong usage or recipe; 3 model or images could not be loaded, or the model not captured;
4 a pass failed; 5 outputs differ or a mask is violated; 6 an accuracy gate failed (the folder is written);
7 a runtime is missing or could not build; 1 the disk or the memory did not suffice, or anything else.
"""


class Schema(StrEnum):
    """What a JSON Schema is printed of."""

    RECIPE = "recipe"
    REPORT = "report"


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


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(version("mpcompile"))
        raise typer.Exit
    return wanted


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Options of the whole command."""


@app.command("compile", epilog=EXIT_CODES)
def compile_command(
    model: ModelArgument,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The folder to write.")] = None,
    pattern: PatternOption = None,
    share_rows: ShareRowsOption = None,
    macs: MacsOption = None,
    budget: BudgetOption = None,
    tome: TomeOption = None,
    target: TargetOption = None,
    data: DataOption = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    permute: PermuteOption = True,
    strict: StrictOption = False,
    criterion: Annotated[
        str | None,
        typer.Option(
            help="How weights are chosen: magnitude, wanda, covariance or joint. [default: joint with --data, else "
            "magnitude]"
        ),
    ] = None,
    refit: Annotated[
        str | None,
        typer.Option(
            help="What kept weights are fitted to: the dense model, the layer's own outputs (layer), or none. "
            "[default: model with --data, else none]"
        ),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, fp16 or bf16, written into the graph. [default: fp32]")
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(help="8: fixed; 1,8,64: free, built for and timed at these; or dynamic. [default: dynamic]"),
    ] = None,
    require_engine: Annotated[
        bool, typer.Option("--require-engine", help="Fail (7) where the target cannot build an engine here.")
    ] = False,
    opset: Annotated[int | None, typer.Option(help="ONNX opset, 18 to 23. [default: 20; 22 for bf16]")] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(help="Take layers back until top-1 falls by no more points, and fail (6) where it still does."),
    ] = None,
    tune: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Try at most N recipes, from this one to milder ones, and take the fastest that keeps --max-drop.",
        ),
    ] = None,
    distill: Annotated[
        int | None,
        typer.Option(metavar="EPOCHS", help="Train on --data against the dense model for so long, masks held."),
    ] = None,
    calibration: CalibrationOption = None,
    held_out: Annotated[int | None, typer.Option(help="Images to evaluate on. [default: all]")] = None,
    seed: SeedOption = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the runtime. [default: its choice]")] = None,
    arch: ArchOption = None,
    arch_arg: ArchArgOption = None,
    pretrained: PretrainedOption = False,
    allow_pickle: AllowPickleOption = False,
    input_size: InputSizeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    leaf: LeafOption = None,
    config: Annotated[Path | None, typer.Option(help="A recipe (YAML); options override it.")] = None,
    start: Annotated[
        str | None,
        typer.Option("--from", metavar="PASS", help="Run from this pass on, and take what those before it left."),
    ] = None,
    keep_passes: Annotated[
        bool, typer.Option("--keep-passes", help="Keep what each pass changed in OUTPUT/passes, for --from.")
    ] = False,
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
    from mpcompile.compile import compile, follow, preview
    from mpcompile.distributed import joined
    from mpcompile.recipe import Recipe, overridden, read_recipe

    given = read_recipe(config) if config else Recipe()
    file_batch, batches = options.batch(batch)
    budget_macs, tome_macs = options.shared_macs(macs, tome, pattern)
    recipe = overridden(
        given,
        budget={
            "patterns": options.patterns(pattern, target or given.target, budget_macs, share_rows),
            "macs": budget_macs,
            "signal": budget,
            "include": include,
            "exclude": exclude,
        },
        permute={"strict": strict} if permute else None,
        mask={"criterion": criterion, "refit": refit},
        tome={"r": tome, "macs": tome_macs},
        restore={"max_drop": max_drop} if data and max_drop is not None else {},
        distill={"epochs": distill} if distill is not None else {},
        evidence={"batch-norm": {}, "certify": {}} if data else {},
        top={"target": target, "precision": precision, "batch": file_batch, "opset": opset},
        nested={
            "data": {"calibration": calibration, "held_out": held_out, "seed": seed},
            "bench": {"threads": threads, "batches": batches},
            "gates": {"max_drop": max_drop, "engine": require_engine or None},
            "tune": {"evaluations": tune},
        },
    )
    request = _request(model, arch, arch_arg, pretrained, allow_pickle, input_size, mean, std, leaf)
    if save_config:
        _write_text(save_config, recipe.to_yaml())
    if dry_run:
        show_preview(preview(request, recipe, data), recipe, as_json)
        return
    if distill is not None and not data:
        raise UsageError("--distill needs images to train on; give --data")
    if output is None:
        raise UsageError("--output is missing; name the folder to write, or use --dry-run")
    failure = None
    try:
        with joined() as here, progress(quiet or as_json or not here.first) as observe:
            if not here.first:
                follow(request, recipe, data)
                return
            artifact = compile(
                request, recipe, data=data, output=output, force=force, start=start, keep_passes=keep_passes,
                observe=observe,
            )  # fmt: skip
    except AccuracyError as error:  # the folder is written, and is shown before the command fails
        failure, artifact = error, Artifact.open(output)
    if as_json:
        typer.echo(artifact.report.model_dump_json(indent=2))
    elif not quiet:
        show_artifact(artifact)
    if failure:
        raise failure


@app.command("analyze")
def analyze_command(
    model: ModelArgument,
    pattern: PatternOption = None,
    share_rows: ShareRowsOption = None,
    macs: MacsOption = None,
    budget: BudgetOption = None,
    target: TargetOption = None,
    data: DataOption = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    plots: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write one SVG a layer and an overview there.")
    ] = None,
    null: Annotated[
        bool, typer.Option(help="Fit each layer's shuffled entries too, which takes as long again.")
    ] = True,
    calibration: CalibrationOption = None,
    seed: SeedOption = None,
    arch: ArchOption = None,
    arch_arg: ArchArgOption = None,
    pretrained: PretrainedOption = False,
    allow_pickle: AllowPickleOption = False,
    input_size: InputSizeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    leaf: LeafOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Show each layer's spectrum and what a budget would plan; change nothing."""
    configure_logging(verbose, quiet)
    from mpcompile.analyze import analyze, budget_from
    from mpcompile.recipe import DataChoice

    given = {
        "patterns": options.patterns(pattern, target or "ort", macs, share_rows),
        "macs": macs,
        "signal": budget,
        "include": include,
        "exclude": exclude,
        "seed": seed,
    }
    step = budget_from({"null": null} | {k: v for k, v in given.items() if v})
    choice = {"calibration": calibration, "seed": seed}
    with progress(quiet or as_json) as observe:
        found = analyze(
            _request(model, arch, arch_arg, pretrained, allow_pickle, input_size, mean, std, leaf),
            step,
            data=data,
            choice=DataChoice.model_validate({k: v for k, v in choice.items() if v is not None}),
            plots=plots,
            observe=observe,
        )
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    elif not quiet:
        show_analysis(found)
        if plots:
            typer.echo(f"Plots are in {plots}, overview.svg first")


def _request(
    model: str,
    arch: str | None,
    arch_arg: list[str] | None,
    pretrained: bool,
    allow_pickle: bool,
    input_size: str | None,
    mean: str | None,
    std: str | None,
    leaf: list[str] | None,
) -> "Request":
    """The model that the options name."""
    from mpcompile.load import Request

    return Request(
        model=model,
        arch=arch,
        arch_args=dict(options.key_value(text) for text in arch_arg or ()),
        pretrained=pretrained,
        allow_pickle=allow_pickle,
        input_size=options.size(input_size),
        mean=options.numbers(mean, "--mean"),
        std=options.numbers(std, "--std"),
        leaves=tuple(leaf or ()),
    )


@app.command("bench")
def bench_command(
    folder: Annotated[Path, typer.Argument(help="An output folder.")],
    target: TargetOption = None,
    batch: Annotated[str | None, typer.Option(help="Batches to time, as 1,8,64. [default: the recipe's]")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the runtime. [default: its choice]")] = None,
    seconds: Annotated[float, typer.Option(help="For each batch; 15 to 200 rounds.")] = 4.0,
    transfers: Annotated[
        bool, typer.Option("--transfers/--no-transfers", help="Count copies to and from a GPU.")
    ] = True,
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph", help="Start a GPU's work as one CUDA graph.")] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Time an output folder on its target: dense, masked with sparse kernels off, and on, in turns."""
    configure_logging(verbose, quiet)
    from mpcompile.bench import Settings, bench

    settings = Settings(target, options.batches(batch), threads, seconds, transfers, cuda_graph)
    with progress(quiet or as_json) as observe:
        found = bench(folder, settings, observe)
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    elif not quiet:
        show_bench(found, folder / "bench" / found.target)


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
    from mpcompile.resolve import known

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
    from mpcompile.report import report_schema
    from mpcompile.resolve import known, recipe_schema

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
        typer.echo(f"mpcompile: {one_line(error)}", err=True)
        raise SystemExit(error.exit_code) from None
    except Exception as error:
        if found := shortage(error, "the command"):
            typer.echo(f"mpcompile: {found}", err=True)
            raise SystemExit(ResourceError.exit_code) from None
        if {"-v", "-vv", "--verbose"} & set(sys.argv):
            raise
        text = f"unforeseen {type(error).__name__}: {one_line(error)}"
        typer.echo(f"mpcompile: {text} (-v shows where; please report it)", err=True)
        raise SystemExit(1) from None
