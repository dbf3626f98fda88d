"""The front door: model + recipe -> Artifact."""

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpcompile.artifact import COMPRESSED, DENSE, PASSES, RECIPE, Artifact, file_rows, write_weights
from mpcompile.bench import command as bench_command
from mpcompile.bench import engine_parity, images_for, in_turns, parity_of
from mpcompile.capture import capture
from mpcompile.checkpoint import state_sha256
from mpcompile.checkpoints import Checkpoints
from mpcompile.conventions import charged_by
from mpcompile.cost import cost
from mpcompile.data import Data, load_data
from mpcompile.distributed import place
from mpcompile.environment import environment
from mpcompile.errors import AccuracyError, UsageError
from mpcompile.evaluate import Comparison, compare
from mpcompile.fingerprint import facts_of
from mpcompile.load import Loaded, Request, load, source_of
from mpcompile.lower import Lowered, lower
from mpcompile.model import NM, Model
from mpcompile.output import require_free, written_whole
from mpcompile.passes import Distill, NMMask
from mpcompile.passes.distill import images_of
from mpcompile.pipeline import Effect, Observer, Pass, PassManager
from mpcompile.plugins import GIVEN
from mpcompile.progress import Progress, reported
from mpcompile.recipe import DataChoice, Recipe
from mpcompile.report import DataUsed, Gate, Latency, Parity, Report
from mpcompile.report_rows import layer_rows
from mpcompile.report_text import verdict_on
from mpcompile.resolve import Plan, plan_of
from mpcompile.resume import keeping
from mpcompile.runtimes import Build, Engine, Judging, Runtime
from mpcompile.runtimes.ort import OrtEngine, cpu_engine, require_finite
from mpcompile.shortage import explained
from mpcompile.timing import speedup, timing
from mpcompile.tune import engine_of, tuned
from mpcompile.tuning import Tuning
from mpcompile.work import note_written, working, written_by

PARITY_IMAGES = 32
ONE_RUN = threading.RLock()


def compile(
    model: str | Path | nn.Module | Request,
    recipe: Recipe,
    *,
    passes: Sequence[Pass] | None = None,
    runtime: Runtime | None = None,
    data: str | Path | Data | None = None,
    output: str | Path,
    force: bool = False,
    start: str | None = None,
    keep_passes: bool = False,
    observe: Callable[[Progress], None] | None = None,
) -> Artifact:
    """The compressed model, its files and its report, in the folder `output`.

    The folder appears whole or not at all; the model given is left as it was. What passes finish is kept beside it
    until then, and a run that follows one that was stopped goes on after them. `start` names the pass to start from, if
    those before it are there; `keep_passes` keeps them all in the folder.

    `passes` are those to run, in order, where the recipe names none: built-in ones or your own, which are written into
    the recipe with every field. With `runtime` the result runs on that in place of the recipe's target. `observe` is
    called in this thread as each stage begins, and each step of a pass; what it raises ends the run (out of a step as
    the cause of a PassError).

    One run at a time: what other threads compile meanwhile waits, since all runs measure speed and torch's exporter is
    not made for threads. Raises a MpcompileError. Where only a gate of the recipe fails, the folder is written, its
    report says so, and AccuracyError is raised: `Artifact.open(output)` has it then.
    """
    plan = plan_of(recipe, passes, runtime)
    with ONE_RUN, reported(observe, stages(plan.recipe)) as tell:
        return _compiled(model, plan, data, Path(output), force, start, keep_passes, tell)


def _compiled(
    model: str | Path | nn.Module | Request,
    plan: Plan,
    data: str | Path | Data | None,
    output: Path,
    force: bool,
    start: str | None,
    keep_passes: bool,
    observe: Observer,
) -> Artifact:
    """`compile`, for the one thread that may."""
    recipe = plan.recipe
    _require_tunable(plan)
    inputs = [path for path in map(_path_of, (model, data)) if path is not None]
    ended = written_by(output) if start is None else None
    if ended is None:
        require_free(output, force, inputs)
    if recipe.gates.max_drop is not None and data is None:
        raise UsageError("a gate on accuracy (--max-drop) needs labelled images (--data)")
    stage = "load"

    def began(name: str) -> None:
        nonlocal stage
        stage = name
        observe(name)

    needed_bytes = 0
    short_of = partial(explained, lambda: stage, output, lambda: needed_bytes)
    with working(output) as work, short_of():
        began("load")
        loaded, leaves = loaded_from(model)
        needed_bytes = output_bytes(loaded.module)
        began("capture")
        dense = capture(loaded.module, loaded.source, leaves=leaves)
        images = data_for(data, dense, recipe.data)
        if recipe.gates.max_drop is not None and not images.held_out.labelled:
            raise UsageError(f"a gate on accuracy (--max-drop) needs labelled images; {'; '.join(images.notes)}")
        tuning = None
        if recipe.tune is not None:
            began("tune")
            recipe, tuning = tuned(recipe, dense, images)
            plan = plan_of(recipe)
        facts = facts_of(dense, images, plan.passes, PassManager(plan.passes).shows_held_out)
        whole = facts[-1] | {"the recipe": recipe.sha256, "what is kept": str(keep_passes)}
        if ended == whole:  # killed when all was written, and only the work folder was left to remove
            for step in plan.passes:
                _skip(step)
            artifact = Artifact.open(output)
        else:
            if ended is not None:
                require_free(output, force, inputs)
            checkpoints = Checkpoints(work, plan.passes, facts, needed_bytes, _skip)
            checkpoints.go_on(start, output / PASSES)
            with (
                written_whole(output, force, inputs) as folder,
                short_of(),  # here too, while what fills the disk is still there
                keeping(work, needed_bytes),
            ):
                report = _run(loaded, dense, plan, images, folder, began, tuning, checkpoints, keep_passes)
                note_written(work, folder, whole)
            artifact = Artifact(output, report)
    failed = [gate for gate in artifact.report.gates if not gate.holds]
    if failed:
        raise AccuracyError(f"{output} is written, and fails its gate: {'; '.join(map(str, failed))}")
    return artifact


def _require_tunable(plan: Plan) -> None:
    """Raises UsageError where the recipe asks for a search that cannot be made."""
    if plan.recipe.tune is None:
        return
    if plan.recipe.gates.max_drop is None:
        raise UsageError("tune needs a limit on the loss of accuracy; give --max-drop (gates.max_drop)")
    if place().size > 1:
        raise UsageError("tune runs in one process; start it without torchrun, then train the recipe that it finds")
    if own := [what for what, origin in plan.origins.items() if origin.endswith(GIVEN)]:
        raise UsageError(f"tune tries recipes, which know no {own[0]} that is {GIVEN}; install it with an entry point")


def output_bytes(module: nn.Module) -> int:
    """About how large an output is: the weights as they are, in three ONNX files, and a byte for each mask's place."""
    tensors: list[Tensor] = list(module.state_dict().values())
    return sum(value.numel() * (4 * value.element_size() + 1) for value in tensors) + 2**20


def _skip(step: Pass) -> None:
    """Tells the processes beside this one of a pass that is taken from a checkpoint."""
    if isinstance(step, Distill):
        step.skip()


def follow(model: str | Path | nn.Module | Request, recipe: Recipe, data: str | Path | Data | None = None) -> None:
    """What a process does that torchrun started beside the first: trains along in each distillation, writes nothing.

    The first process calls `compile` with the same arguments. Raises a MpcompileError.
    """
    plan = plan_of(recipe)
    loaded, leaves = loaded_from(model)
    dense = capture(loaded.module, loaded.source, leaves=leaves)
    images = data_for(data, dense, recipe.data)
    for step in plan.passes:
        if isinstance(step, Distill):
            step.follow(images, dense.source)


def stages(recipe: Recipe) -> tuple[str, ...]:
    """The names of the stages that `compile` tells, in order."""
    passes = tuple(step.name for step in recipe.passes)
    tune = () if recipe.tune is None else ("tune",)
    return (
        "load",
        "capture",
        *tune,
        "export dense",
        *passes,
        "export compressed",
        "build",
        "evaluate",
        "time",
        "write",
    )


def preview(
    model: str | Path | nn.Module | Request, recipe: Recipe, data: str | Path | Data | None = None
) -> dict[str, Any]:
    """What `compile` would do, without doing it: resolved recipe, stages, each layer's pattern or reason.

    Passes that only analyse are run, since they decide; of the others the first mask pass is asked.
    """
    plan = plan_of(recipe)
    loaded, leaves = loaded_from(model)
    dense = capture(loaded.module, loaded.source, leaves=leaves)
    images = data_for(data, dense, recipe.data)
    analyses = [step for step in plan.passes if step.effect is Effect.ANALYSIS]
    planned, _ = PassManager(analyses).run(dense, images.for_passes())
    rows = [
        {
            "layer": name,
            "pattern": str(choice) if isinstance(choice, NM) else None,
            "reason": choice if isinstance(choice, str) else None,
        }
        for step in plan.passes
        if isinstance(step, NMMask)
        for name, choice in step.choices(planned).items()
    ]
    return {
        "model": dataclasses.asdict(loaded.source),
        "recipe": recipe.model_dump(mode="json"),
        "stages": stages(recipe),
        "layers": rows,
    }


def loaded_from(model: str | Path | nn.Module | Request) -> tuple[Loaded, tuple[str, ...]]:
    """The module, and the modules to keep whole when tracing it."""
    if isinstance(model, nn.Module):
        name = type(model).__name__
        return Loaded(model, source_of(model, name=name, arch=name, sha256=state_sha256(model))), ()
    request = model if isinstance(model, Request) else Request(str(model))
    return load(request), request.leaves


def _path_of(given: object) -> Path | None:
    """The file or folder that a model or images were named by."""
    name = given.model if isinstance(given, Request) else given
    return Path(name) if isinstance(name, str | Path) else None


def data_for(data: str | Path | Data | None, dense: Model, choice: DataChoice) -> Data:
    """The images for a model: those given, or read from where they are. Raises LoadError."""
    if data is None:
        return Data()
    if isinstance(data, Data):
        return data
    logits = dense(dense.example)
    outputs = logits.shape[1] if logits.ndim == 2 else 0  # more axes are no classes to count hits in
    return load_data(
        Path(data), dense.source, outputs, choice.calibration, choice.held_out, choice.seed, choice.validation
    )


def _run(
    loaded: Loaded,
    dense: Model,
    plan: Plan,
    data: Data,
    folder: Path,
    observe: Observer,
    tuning: Tuning | None,
    checkpoints: Checkpoints,
    keep_passes: bool,
) -> Report:
    """Everything between the captured model and the finished folder."""
    recipe = plan.recipe
    metadata = {
        "mpcompile.version": version("mpcompile"),
        "mpcompile.source_sha256": loaded.source.sha256,
        "mpcompile.recipe_sha256": recipe.sha256,
    }
    check = _check_images(data, dense)

    def export(model: Model, name: str) -> Lowered:
        return lower(
            model, folder / name, precision=recipe.precision, batch=recipe.batch, opset=recipe.opset, metadata=metadata
        )

    observe("export dense")
    before = export(dense, DENSE)
    parity = [_parity(before, check, "dense: ONNX Runtime against PyTorch")]
    model, records = PassManager(plan.passes).run(dense, data, observe, checkpoints)
    dense_cost, cost_left = cost(dense), cost(model)
    observe("export compressed")
    after = export(model, COMPRESSED)
    require_finite(after, _calibration(data, check))
    parity.append(_parity(after, check, "compressed: ONNX Runtime against PyTorch"))

    observe("build")
    batches = recipe.timed_batches
    build = Build(threads=recipe.bench.threads, batches=batches, folder=folder)
    unmasked, prepared = (plan.runtime.prepare(exported, folder, build) for exported in (before, after))
    verdicts = prepared.verdicts
    engines: dict[str, Engine] = {}
    for name, exported in (("dense", before), ("compressed", after)):
        # What runs nowhere here is judged by what runs the same file.
        engines[name] = engine_of(plan, exported, build)
        if type(engines[name]) is not OrtEngine:  # that one runs the very file that was compared above
            parity.append(engine_parity(engines[name], exported, check, f"{name}: target {recipe.target}"))
    observe("evaluate")
    comparison = compare(engines["dense"], engines["compressed"], data.held_out) if len(data.held_out) else None
    observe("time")
    latency: tuple[Latency, ...] = ()
    if not plan.idle:
        latency = tuple(_latency(engines, data, dense, batch, recipe.bench.seconds) for batch in batches)
        if isinstance(engines["compressed"], Judging):
            images = images_for(data.held_out, dense.example.numpy(), batches[-1])
            verdicts = engines["compressed"].judged(verdicts, after.masks, images)
    observe("write")
    write_weights(folder, loaded.module, model)
    (folder / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
    if keep_passes:
        checkpoints.keep_in(folder / PASSES)
    layers = layer_rows(model, after, dense_cost, cost_left)
    costs = charged_by(dense_cost, cost_left, model)
    patterns = {NM.parse(row.pattern) for row in layers if row.pattern}
    accelerated = bool(patterns) and all(map(plan.runtime.has_kernel, patterns))
    if not plan.idle and verdicts:
        accelerated = any(row.chosen for row in verdicts)
    commands: tuple[str, ...] = ()
    if plan.idle and plan.runtime.offline:
        commands = (*prepared.commands, bench_command(recipe.target, batches))
    report = Report(
        version=version("mpcompile"),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=loaded.source,
        recipe=recipe,
        recipe_sha256=recipe.sha256,
        environment=environment({**_versions(plan.runtime), **plan.origins}, engines["dense"].device),
        data=DataUsed(
            calibration=len(data.calibration),
            validation=len(data.validation),
            training=len(images_of(data)) if model.epochs else 0,
            held_out=len(data.held_out),
            seed=recipe.data.seed,
            notes=data.notes,
        ),
        passes=records,
        layers=layers,
        certificate=model.certificate,
        cost=costs,
        epochs=model.epochs,
        accelerated=accelerated,
        parity=tuple(parity),
        comparison=comparison,
        tuning=tuning,
        latency=latency,
        gates=gates_of(recipe, comparison),
        idle=plan.idle,
        notes=(*unmasked.notes, *prepared.notes),
        commands=commands,
        verdicts=verdicts,
        files=file_rows(folder),
        verdict=verdict_on(
            layers, recipe.target, accelerated, costs, comparison, latency, verdicts, plan.idle, model.certificate
        ),
    )
    report.write(folder)
    return report


def gates_of(recipe: Recipe, comparison: Comparison | None) -> tuple[Gate, ...]:
    """The recipe's gates and whether they hold."""
    limit = recipe.gates.max_drop
    if limit is None or comparison is None or comparison.dense is None or comparison.compressed is None:
        return ()
    drop = 100 * (comparison.dense.top1 - comparison.compressed.top1)
    return (Gate(name="top-1 drop in points", limit=limit, found=drop, holds=drop <= limit),)


def _check_images(data: Data, model: Model) -> NDArray[np.float32]:
    """Images to compare forms of the model on: calibration images where there are any, else the example."""
    images = data.calibration.first(PARITY_IMAGES) if len(data.calibration) else model.example
    return np.ascontiguousarray(images.numpy())


def _calibration(data: Data, check: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """Every calibration image, or the example."""
    if not len(data.calibration):
        yield check
    for images, _ in data.calibration.batches():
        yield images.numpy()


def _parity(lowered: Lowered, images: NDArray[np.float32], what: str) -> Parity:
    """The ONNX file against the graph that it was made from. Raises ParityError."""
    expected, found = lowered.model(torch.from_numpy(images)).numpy(), cpu_engine(lowered)(images)
    if lowered.precision == "bf16":
        what += ", in float32 on the rounded weights"
    return parity_of(expected, found, lowered, what)


def _latency(engines: dict[str, Engine], data: Data, model: Model, batch: int, seconds: float) -> Latency:
    """Dense and compressed in turns, on real images where there are enough."""
    samples = in_turns(engines, data.held_out, model.example.numpy(), batch, seconds)
    return Latency(
        dense=timing(samples["dense"], batch, engines["dense"].device),
        compressed=timing(samples["compressed"], batch, engines["compressed"].device),
        speedup=speedup(samples["dense"], samples["compressed"], "dense"),
    )


def _versions(runtime: Runtime) -> dict[str, str]:
    names: Sequence[str] = ("torch", "timm", "onnx", "onnxscript")
    return {**{name: version(name) for name in names}, **runtime.versions()}
