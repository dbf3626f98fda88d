"""`mpcompile compile`: builds a recipe from the options, writes the output folder and prints its summary."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import mpcompile.cli.parse as parse
from mpcompile.cli.app import Command, app, epilog_of
from mpcompile.cli.choices import CRITERIA, PASSES, PRECISIONS, REFITS, completion, listed
from mpcompile.cli.console import Shown, configure_logging, progress, show_times
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
    ConfidenceOption,
    DataOption,
    DeviceOption,
    ExcludeOption,
    ExifOption,
    HeadOption,
    IncludeOption,
    JsonOption,
    MacsOption,
    MemoryOption,
    PatternOption,
    PermuteOption,
    PolishOption,
    QuietOption,
    SeedOption,
    ShareRowsOption,
    SkipBrokenOption,
    StrictOption,
    TargetOption,
    TomeOption,
    VerboseOption,
)
from mpcompile.cli.parse import request_of
from mpcompile.errors import AccuracyError, UsageError


@app.command("compile", cls=Command, epilog=epilog_of("compile", codes=True))
def compile_command(
    model: ModelArgument,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write.")] = None,
    pattern: PatternOption = None,
    share_rows: ShareRowsOption = None,
    macs: MacsOption = None,
    budget: BudgetOption = None,
    tome: TomeOption = None,
    target: TargetOption = None,
    data: DataOption = None,
    head: HeadOption = None,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="PKG.MOD:FN",
            help="A metric of your own, in place of accuracy: a function of outputs and targets. Higher is better. "
            "--max-drop is in its units.",
        ),
    ] = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    permute: PermuteOption = True,
    strict: StrictOption = False,
    criterion: Annotated[
        str | None,
        typer.Option(
            help=f"How the kept weights are selected: {listed(CRITERIA)}. [default: joint with --data, else magnitude]",
            autocompletion=completion(CRITERIA),
        ),
    ] = None,
    refit: Annotated[
        str | None,
        typer.Option(
            help="What the kept weights are refitted to: the activations of the dense model (model), the layer's own "
            "dense outputs (layer), or nothing (none). [default: model with --data, else none]",
            autocompletion=completion(REFITS),
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help=f"Precision of the ONNX graph: {listed(PRECISIONS)}. int8 and fp8 quantise on the images of --data, "
            "with or without --pattern. [default: fp32]",
            autocompletion=completion(PRECISIONS),
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            help="Batch size. 8: fixed. 1,8,64: dynamic, built for these sizes and timed at them. [default: dynamic]"
        ),
    ] = None,
    require_engine: Annotated[
        bool,
        typer.Option(
            "--require-engine", help="Fail (exit code 7) if the target cannot build an engine on this machine."
        ),
    ] = False,
    opset: Annotated[
        int | None, typer.Option(help="ONNX opset, from 18 to 23. [default: 20; 21 for int8 and fp8; 22 for bf16]")
    ] = None,
    max_drop: Annotated[
        str | None,
        typer.Option(
            metavar="LIMITS",
            help="Largest drop of top-1 accuracy, in points, or of --metric. Layers are restored to dense until the "
            "drop on validation images is within it. Fail (exit code 6) if the drop on held-out images is larger, or "
            "if the dense accuracy cannot be right. top1=0.5,ece=0.02,kl=0.1 also limits the rise of the calibration "
            "error and the divergence from the dense model in nats, on held-out images only.",
        ),
    ] = None,
    tune: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Try at most N recipes, from this one to milder ones. Use the fastest that keeps --max-drop.",
        ),
    ] = None,
    confidence: ConfidenceOption = True,
    distill: Annotated[
        int | None,
        typer.Option(
            metavar="EPOCHS", help="Fine-tune on --data against the dense model for this many epochs, masks fixed."
        ),
    ] = None,
    polish: PolishOption = None,
    calibration: CalibrationOption = None,
    held_out: Annotated[int | None, typer.Option(help="Number of held-out images to evaluate. [default: all]")] = None,
    seed: SeedOption = None,
    classes: ClassesOption = None,
    exif: ExifOption = None,
    alpha: AlphaOption = None,
    skip_broken: SkipBrokenOption = False,
    threads: Annotated[int | None, typer.Option(help="Threads of the runtime. [default: its own choice]")] = None,
    device: DeviceOption = None,
    memory: MemoryOption = None,
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
    config: Annotated[Path | None, typer.Option(help="Recipe file (YAML). Options override it.")] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="PASS",
            help="Start at this pass and reuse the results of the passes before it.",
            autocompletion=completion(PASSES),
        ),
    ] = None,
    keep_passes: Annotated[
        bool, typer.Option("--keep-passes", help="Keep the result of each pass in OUTPUT/passes, for --from.")
    ] = False,
    save_config: Annotated[Path | None, typer.Option(help="Write the resolved recipe to this file.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan for each layer; write no output.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an output folder that mpcompile wrote.")] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Compress MODEL, check every step, and write the output folder."""
    configure_logging(verbose, quiet)
    from mpcompile.cli.tables import show_artifact, show_preview
    from mpcompile.driver.artifact import Artifact
    from mpcompile.driver.commented_recipe import commented
    from mpcompile.driver.compile import compile, preview
    from mpcompile.driver.follow import follow
    from mpcompile.driver.run_plan import plan_of
    from mpcompile.recipe.overrides import overridden
    from mpcompile.recipe.schema import Recipe, read_recipe
    from mpcompile.system.distributed import process_group

    given = read_recipe(config) if config else Recipe()
    file_batch, batches = parse.batch(batch)
    limits = parse.drop_limits(max_drop)
    budget_macs, tome_macs = parse.macs_by_pass(macs, tome, pattern)
    evidence: dict[str, dict[str, Any]] = {"batch-norm": {}}
    if not (submodule or given.submodule):
        evidence |= {"confidence": {}, "certify": {}}  # the outputs of a part are no answers
    recipe = overridden(
        given,
        budget={
            "patterns": parse.patterns(
                pattern, target or given.target, budget_macs, share_rows, precision or given.precision
            ),
            "macs": budget_macs,
            "signal": budget,
            "include": include,
            "exclude": exclude,
        },
        permute={"strict": strict} if permute else None,
        mask={"criterion": criterion, "refit": refit},
        tome={"r": tome, "macs": tome_macs},
        restore={"max_drop": limits["max_drop"]} if data and limits["max_drop"] is not None else {},
        distill={"epochs": distill} if distill is not None else {},
        polish={"minutes": polish} if polish is not None else {},
        quantize={"include": include, "exclude": exclude},
        exact={"drop-unread-tokens": {}},
        evidence=evidence if data else {},
        confidence=confidence,
        top={
            "target": target,
            "precision": precision,
            "device": device,
            "batch": file_batch,
            "opset": opset,
            "head": head,
            "submodule": submodule,
            "metric": metric,
        },
        nested={
            "data": {
                "calibration": calibration,
                "held_out": held_out,
                "seed": seed,
                **parse.reading(classes, exif, alpha, skip_broken),
            },
            "bench": {"threads": threads, "batches": batches},
            "gates": {**limits, "engine": require_engine or None},
            "tune": {"evaluations": tune},
        },
    )
    request = request_of(
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
    )
    memory_bytes = parse.memory(memory)
    if save_config:
        _write_text(save_config, commented(plan_of(recipe).recipe))  # with what the target decides
    if distill is not None and not data:
        raise UsageError("--distill needs images to train on; give --data")
    if polish is not None and not data:
        raise UsageError("--polish needs images to train on; give --data")
    if dry_run:
        plan = preview(request, recipe, data, output, force, memory_bytes)
        show_preview(plan, Recipe.checked(plan["recipe"]), as_json)
        return
    if output is None:
        raise UsageError("--output is missing; name the folder to write, or use --dry-run")
    failure: AccuracyError | None = None
    observe: Shown | None = None
    try:
        with process_group(recipe.device) as here, progress(quiet or as_json or not here.first) as observe:
            if not here.first:
                follow(request, recipe, data, output, memory_bytes)
                return
            artifact = compile(
                request, recipe, data=data, output=output, force=force, start=start, keep_passes=keep_passes,
                observe=observe, command_line=("mpcompile", *sys.argv[1:]), memory_bytes=memory_bytes,
            )  # fmt: skip
    except AccuracyError as error:  # the folder is complete: print it, then fail
        failure, artifact = error, Artifact.open(output)
    if as_json:
        typer.echo(artifact.report.model_dump_json(indent=2))
    elif not quiet:
        show_artifact(artifact)
        show_times(observe)
    if failure:
        raise failure


def _write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error
