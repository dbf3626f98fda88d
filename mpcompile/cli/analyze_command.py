"""`mpcompile analyze`: analyses a model and prints the result as tables or JSON."""

from pathlib import Path
from typing import Annotated

import typer

import mpcompile.cli.parse as parse
from mpcompile.cli.app import Command, app, epilog_of
from mpcompile.cli.choices import PRECISIONS, completion
from mpcompile.cli.console import configure_logging, progress, show_times
from mpcompile.cli.model_options import (
    AllowPickleOption,
    ArchArgOption,
    ArchOption,
    ChannelOrderOption,
    CropPctOption,
    InputOption,
    InputSizeOption,
    InterpolationOption,
    LeafOption,
    MeanOption,
    ModelArgument,
    OutputNameOption,
    PreprocessOption,
    PretrainedOption,
    ResizeOption,
    StdOption,
    SubmoduleOption,
    WeightsKeyOption,
)
from mpcompile.cli.options import (
    AlphaOption,
    BudgetOption,
    CalibrationOption,
    ClassesOption,
    DataOption,
    ExcludeOption,
    ExifOption,
    HeadOption,
    IncludeOption,
    JsonOption,
    MacsOption,
    PatternOption,
    QuietOption,
    SeedOption,
    ShareRowsOption,
    SkipBrokenOption,
    TargetOption,
    VerboseOption,
)
from mpcompile.cli.parse import request_of


@app.command("analyze", cls=Command, epilog=epilog_of("analyze"))
def analyze_command(
    model: ModelArgument,
    pattern: PatternOption = None,
    share_rows: ShareRowsOption = None,
    macs: MacsOption = None,
    budget: BudgetOption = None,
    target: TargetOption = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Precision of the speed forecast and of --pattern auto: fp32, or int8, beside dense fp32 and dense "
            "int8. [default: fp32]",
            autocompletion=completion({name: PRECISIONS[name] for name in ("fp32", "int8")}),
        ),
    ] = None,
    data: DataOption = None,
    head: HeadOption = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    plots: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write one SVG for each layer and an overview to this folder.")
    ] = None,
    null: Annotated[bool, typer.Option(help="Fit each layer's shuffled entries too, which doubles the time.")] = True,
    calibration: CalibrationOption = None,
    seed: SeedOption = None,
    classes: ClassesOption = None,
    exif: ExifOption = None,
    alpha: AlphaOption = None,
    skip_broken: SkipBrokenOption = False,
    arch: ArchOption = None,
    arch_arg: ArchArgOption = None,
    pretrained: PretrainedOption = False,
    allow_pickle: AllowPickleOption = False,
    weights_key: WeightsKeyOption = None,
    input_size: InputSizeOption = None,
    preprocess: PreprocessOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    resize: ResizeOption = None,
    crop_pct: CropPctOption = None,
    interpolation: InterpolationOption = None,
    channel_order: ChannelOrderOption = None,
    leaf: LeafOption = None,
    model_input: InputOption = None,
    output_name: OutputNameOption = None,
    submodule: SubmoduleOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Show each layer's spectrum and the pattern that a budget would plan; change nothing."""
    configure_logging(verbose, quiet)
    from mpcompile.cli.tables import show_analysis
    from mpcompile.driver.analyze import analyze, budget_from
    from mpcompile.recipe.schema import Recipe

    params = {
        "patterns": parse.patterns(pattern, target or "ort", macs, share_rows, precision or "fp32"),
        "macs": macs,
        "signal": budget,
        "include": include,
        "exclude": exclude,
        "seed": seed,
    }
    step = budget_from({"null": null} | {k: v for k, v in params.items() if v})
    choice = {"calibration": calibration, "seed": seed, **parse.reading(classes, exif, alpha, skip_broken)}
    with progress(quiet or as_json) as observe:
        found = analyze(
            request_of(
                model,
                arch,
                arch_arg,
                pretrained,
                allow_pickle,
                input_size,
                mean,
                std,
                leaf,
                preprocess,
                resize,
                crop_pct,
                interpolation,
                channel_order,
                weights_key,
                model_input,
                output_name,
            ),
            step,
            data=data,
            choice=Recipe.checked({"data": {k: v for k, v in choice.items() if v is not None}}, "options").data,
            head=parse.head(head),
            submodule=submodule,
            plots=plots,
            precision=parse.precision_named(precision or "fp32"),
            observe=observe,
        )
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    elif not quiet:
        show_analysis(found)
        show_times(observe)
        if plots:
            typer.echo(f"Plots written to {plots}; start with overview.svg")
