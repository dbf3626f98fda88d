"""From a captured model to a finished folder: passes, both ONNX files, engines, what was measured, and the report."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mpcompile.analysis.block_macs import charged_by
from mpcompile.analysis.macs import cost
from mpcompile.data.images import Data
from mpcompile.driver.artifact import COMPRESSED, DENSE, PASSES, RECIPE, file_rows, write_weights
from mpcompile.driver.bench import command as bench_command
from mpcompile.driver.compare_engines import engine_parity, images_for, in_turns, parity_of
from mpcompile.driver.run_plan import RunPlan, build_of, engine_of, lowered
from mpcompile.export.onnx_export import Lowered
from mpcompile.frontend.load_model import Loaded
from mpcompile.ir.model import Model, Source
from mpcompile.ir.pattern import NM
from mpcompile.measure.accuracy import Comparison, compare
from mpcompile.measure.layer_verdict import LayerVerdict
from mpcompile.measure.timing import speedup, timing
from mpcompile.passes.distill.distill import images_of
from mpcompile.pipeline.checkpoints import Checkpoints
from mpcompile.pipeline.pass_manager import Observer, PassManager
from mpcompile.recipe.schema import Recipe
from mpcompile.report.layer_rows import layer_rows
from mpcompile.report.schema import DataUsed, Gate, Latency, LayerRow, Parity, Report
from mpcompile.report.search_schema import Tuning
from mpcompile.report.sentences import verdict_on
from mpcompile.runtimes import Engine, ReportsKernels, Runtime
from mpcompile.runtimes.ort.overflow import require_finite
from mpcompile.runtimes.ort.session import OrtEngine, cpu_engine
from mpcompile.system.hardware import environment

PARITY_IMAGES = 32


def produced(
    loaded: Loaded,
    dense: Model,
    plan: RunPlan,
    data: Data,
    folder: Path,
    observe: Observer,
    tuning: Tuning | None,
    checkpoints: Checkpoints,
    keep_passes: bool,
) -> Report:
    """Runs the passes of a plan and writes all files of the output into `folder`. Raises a MpcompileError."""
    recipe = plan.recipe
    check = _check_images(data, dense)
    export = partial(_exported, loaded.source, recipe, folder)
    observe("export dense")
    before = export(dense, DENSE)
    parity = _parity(before, check, "dense: ONNX Runtime against PyTorch")
    model, records = PassManager(plan.passes).run(dense, data, observe, checkpoints)
    dense_cost, cost_left = cost(dense), cost(model)
    observe("export compressed")
    after = export(model, COMPRESSED)
    require_finite(after, _calibration(data, check))
    parities = (parity, _parity(after, check, "compressed: ONNX Runtime against PyTorch"))
    observe("build")
    built = _built(plan, before, after, folder, check)
    observe("evaluate")
    engines = built.dense, built.compressed
    comparison = compare(*engines, data.held_out) if len(data.held_out) else None
    observe("time")
    latency = () if plan.idle else _latencies(*engines, data, dense, recipe)
    verdicts = built.verdicts if plan.idle else _judged(built, after, data, dense, recipe)
    observe("write")
    write_weights(folder, loaded.module, model)
    (folder / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
    if keep_passes:
        checkpoints.copy_to(folder / PASSES)
    layers = layer_rows(model, after, dense_cost, cost_left)
    costs = charged_by(dense_cost, cost_left, model)
    accelerated = _accelerated(plan, layers, verdicts)
    report = Report(
        version=version("mpcompile"),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=loaded.source,
        recipe=recipe,
        recipe_sha256=recipe.sha256,
        environment=environment({**_versions(plan.runtime), **plan.origins}, built.dense.device),
        data=_used(data, model, recipe),
        passes=records,
        layers=layers,
        certificate=model.certificate,
        cost=costs,
        epochs=model.epochs,
        accelerated=accelerated,
        parity=(*parities, *built.parity),
        comparison=comparison,
        tuning=tuning,
        latency=latency,
        gates=gates_of(recipe, comparison),
        idle=plan.idle,
        notes=built.notes,
        commands=built.commands,
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


@dataclass(frozen=True, slots=True)
class Built:
    """Both files on the target, and what that made or said of them; `commands` do it elsewhere, where it runs."""

    dense: Engine
    compressed: Engine
    parity: tuple[Parity, ...]
    verdicts: tuple[LayerVerdict, ...]
    notes: tuple[str, ...]
    commands: tuple[str, ...]


def _built(plan: RunPlan, before: Lowered, after: Lowered, folder: Path, check: NDArray[np.float32]) -> Built:
    """The engines, held against ONNX Runtime on the CPU. Raises BuildError or ParityError."""
    recipe = plan.recipe
    build = build_of(recipe, folder)
    unmasked, prepared = (plan.runtime.prepare(exported, folder, build) for exported in (before, after))
    parity: list[Parity] = []

    def engine(exported: Lowered, name: str) -> Engine:
        made = engine_of(plan, exported, build)
        if type(made) is not OrtEngine:  # that one runs the very file that was compared before
            parity.append(engine_parity(made, exported, check, f"{name}: target {recipe.target}"))
        return made

    dense, compressed = engine(before, "dense"), engine(after, "compressed")
    commands: tuple[str, ...] = ()
    if plan.idle and plan.runtime.offline:
        commands = (*prepared.commands, bench_command(recipe.target, recipe.timed_batches))
    return Built(dense, compressed, tuple(parity), prepared.verdicts, (*unmasked.notes, *prepared.notes), commands)


def _exported(source: Source, recipe: Recipe, folder: Path, model: Model, name: str) -> Lowered:
    """An ONNX file of the output, which says what it comes from."""
    metadata = {
        "mpcompile.version": version("mpcompile"),
        "mpcompile.source_sha256": source.sha256,
        "mpcompile.recipe_sha256": recipe.sha256,
    }
    return lowered(recipe, model, folder / name, metadata)


def _judged(built: Built, after: Lowered, data: Data, model: Model, recipe: Recipe) -> tuple[LayerVerdict, ...]:
    """What became of each masked layer, as the engine tells it where it can."""
    if not isinstance(built.compressed, ReportsKernels):
        return built.verdicts
    images = images_for(data.held_out, model.example.numpy(), recipe.timed_batches[-1])
    return built.compressed.judged(built.verdicts, after.masks, images)


def _accelerated(plan: RunPlan, layers: tuple[LayerRow, ...], verdicts: tuple[LayerVerdict, ...]) -> bool:
    """Whether masked layers run on sparse kernels: as seen of each, or else by what kernels the target has."""
    if not plan.idle and verdicts:
        return any(row.chosen for row in verdicts)
    patterns = {NM.parse(row.pattern) for row in layers if row.pattern}
    return bool(patterns) and all(map(plan.runtime.has_kernel, patterns))


def _used(data: Data, model: Model, recipe: Recipe) -> DataUsed:
    """How many images were used for what."""
    return DataUsed(
        calibration=len(data.calibration),
        validation=len(data.validation),
        training=len(images_of(data)) if model.epochs else 0,
        held_out=len(data.held_out),
        seed=recipe.data.seed,
        notes=data.notes,
    )


def _latencies(dense: Engine, compressed: Engine, data: Data, model: Model, recipe: Recipe) -> tuple[Latency, ...]:
    """Both in turns at every batch size, on real images where there are enough."""
    found = []
    engines, example = {"dense": dense, "compressed": compressed}, model.example.numpy()
    for batch in recipe.timed_batches:
        samples = in_turns(engines, data.held_out, example, batch, recipe.bench.seconds)
        before, after = (timing(samples[name], batch, engine.device) for name, engine in engines.items())
        ratio = speedup(samples["dense"], samples["compressed"], "dense")
        found.append(Latency(dense=before, compressed=after, speedup=ratio))
    return tuple(found)


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


def _parity(exported: Lowered, images: NDArray[np.float32], what: str) -> Parity:
    """The ONNX file against the graph that it was made from. Raises ParityError."""
    expected, found = exported.model(torch.from_numpy(images)).numpy(), cpu_engine(exported)(images)
    if exported.precision == "bf16":
        what += ", in float32 on the rounded weights"
    return parity_of(expected, found, exported, what)


def _versions(runtime: Runtime) -> dict[str, str]:
    names: Sequence[str] = ("torch", "timm", "onnx", "onnxscript")
    return {**{name: version(name) for name in names}, **runtime.versions()}
