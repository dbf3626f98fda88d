"""Builds the engines of a run and measures them: parity, latency, and the kernel of each masked layer."""

from dataclasses import dataclass
from pathlib import Path

from mpcompile.data.images import Data
from mpcompile.driver.bench import command as bench_command
from mpcompile.driver.compare_engines import Arrays, arrays, engine_parity, inputs_for, interleaved_times_ms
from mpcompile.driver.quantized_baselines import (
    Baseline,
    Outputs,
    all_evaluated,
    evaluated,
    outputs_of,
    over_fastest,
    part_in_float,
    replayed,
    timed,
)
from mpcompile.driver.run_plan import RunPlan
from mpcompile.export.onnx_export import Lowered
from mpcompile.ir.model import Model
from mpcompile.ir.precision import QUANTIZED
from mpcompile.measure.layer_verdict import LayerVerdict
from mpcompile.measure.quantized_layer import QuantizedLayer
from mpcompile.measure.timing import Speedup, speedup, timing
from mpcompile.recipe.schema import Recipe
from mpcompile.report.quantized_schema import Variant
from mpcompile.report.schema import Latency, Parity
from mpcompile.runtimes import Engine, ReportsKernels, ReportsQuantizedLayers, ReportsReference
from mpcompile.system.progress import tracked


@dataclass(frozen=True, slots=True)
class Built:
    """The engines of the files on the target, and what the runtime reported about the files."""

    dense: Engine
    compressed: Engine
    dense_quantized: Engine | None  # the dense model in 8 bits, if it has a file of its own
    parity: tuple[Parity, ...]
    verdicts: tuple[LayerVerdict, ...]
    notes: tuple[str, ...]
    commands: tuple[str, ...]  # to build and time the engines on the target machine, if they do not run on this one


def built_engines(
    plan: RunPlan,
    before: Lowered,
    after: Lowered,
    quantized: Lowered | None,
    folder: Path,
    check: Arrays,
) -> Built:
    """The engines, compared with ONNX Runtime on the CPU; `quantized` is the dense model in 8 bits.

    Raises BuildError or ParityError.
    """
    recipe = plan.recipe
    build = plan.build_options(folder)
    prepared = plan.runtime.prepare(after, folder, build)
    others = [plan.runtime.prepare(exported, folder, build) for exported in (before, quantized) if exported]
    parity: list[Parity] = []

    def engine(exported: Lowered, name: str) -> Engine:
        built = plan.build_engine(exported, build)
        if not (isinstance(built, ReportsReference) and built.is_reference):  # that was compared with PyTorch before
            parity.append(engine_parity(built, exported, check, f"{name}: target {recipe.target}"))
        return built

    dense, compressed = engine(before, "dense"), engine(after, "compressed")
    dense_quantized = engine(quantized, f"dense in {recipe.precision}") if quantized else None
    commands: tuple[str, ...] = ()
    if plan.idle and plan.runtime.offline:
        commands = (*prepared.commands, bench_command(recipe.target, recipe.timed_batches))
    notes = tuple(note for one in (*others, prepared) for note in one.notes)
    return Built(dense, compressed, dense_quantized, tuple(parity), prepared.verdicts, notes, commands)


def quantized_rows(
    plan: RunPlan, dense: Engine, in_float: Outputs, baselines: tuple[Baseline, ...], data: Data, model: Model
) -> tuple[Variant | None, tuple[Baseline, ...]]:
    """The model before the pass `quantize`, whose outputs are `in_float`, and the baselines, on held-out images.

    The first is None if `in_float` is empty.
    """
    images = data.held_out
    if not len(images) or not (in_float or baselines):
        return None, baselines
    outputs = outputs_of(dense, images)
    before = None
    if in_float:
        before = evaluated(Variant(part_in_float(plan)), replayed(in_float), outputs, images, model.head)
    return before, all_evaluated(baselines, outputs, images, model.head)


def latencies(
    plan: RunPlan, built: Built, baselines: tuple[Baseline, ...], data: Data, model: Model
) -> tuple[tuple[Latency, ...], tuple[Baseline, ...], tuple[Speedup, ...]]:
    """Latency at every batch size, all engines timed in interleaved rounds.

    Returns the latency of the dense and the compressed engine, the baselines with theirs, and the speedup of the
    compressed engine over the fastest baseline at each batch size. The last is empty without baselines, and nothing is
    timed if the target does not run here.
    """
    if plan.idle:
        return (), baselines, ()
    rows, over, recipe = [], [], plan.recipe
    engines, example = {"dense": built.dense, "compressed": built.compressed}, arrays(model.example_inputs)
    others = {baseline.row.name: baseline.engine for baseline in baselines if baseline.engine}
    for batch in tracked(recipe.timed_batches, "batch size {}".format, "batch sizes"):
        samples = interleaved_times_ms(engines | others, data.held_out, example, batch, recipe.bench.seconds)
        before, after = (timing(samples[name], batch, engine.device) for name, engine in engines.items())
        ratio = speedup(samples["dense"], samples["compressed"], "dense")
        rows.append(Latency(dense=before, compressed=after, speedup=ratio))
        baselines = timed(baselines, samples, batch)
        over += [over_fastest(baselines, samples)] if others else []
    return tuple(rows), baselines, tuple(over)


def quantized_kernels(plan: RunPlan, built: Built, data: Data, model: Model) -> tuple[QuantizedLayer, ...]:
    """For each quantised layer whether it ran on an 8-bit kernel; empty if no engine ran or it does not report it."""
    in_8_bits = plan.recipe.precision in QUANTIZED and not plan.idle
    if not in_8_bits or not isinstance(built.compressed, ReportsQuantizedLayers):
        return ()
    images = inputs_for(data.held_out, arrays(model.example_inputs), plan.recipe.timed_batches[-1])[0]
    return built.compressed.quantised_layers(images)


def kernel_verdicts(built: Built, after: Lowered, data: Data, model: Model, recipe: Recipe) -> tuple[LayerVerdict, ...]:
    """A verdict for each masked layer, with the chosen kernel if the engine reports its kernels."""
    if not isinstance(built.compressed, ReportsKernels):
        return built.verdicts
    images = inputs_for(data.held_out, arrays(model.example_inputs), recipe.timed_batches[-1])[0]
    return built.compressed.judged(built.verdicts, after.masks, images)
