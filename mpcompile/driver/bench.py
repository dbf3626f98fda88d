"""`mpcompile bench`: times the compressed model of an output folder against its dense model on one target.

Three engines are timed in interleaved rounds: A, the dense file; B, the compressed file without sparse kernels; C, the
compressed file with sparse kernels. B/A is the speedup from the graph (merged tokens), C/B the speedup from sparse
kernels, and C/A the total. C selects its kernels anew on this machine. If the folder holds a file with kernels selected
at compile time, that file is timed as a fourth engine. Precision, runtime and settings are the same for all; but in
int8 and fp8 the dense file is in fp32. The dense model in 8 bits, if the folder has it, is then timed too, with all
kernels allowed. On the target `ort`, C/B of an int8 file is the speedup from native kernels in all layers, and C over
the dense model in 8 bits is what the other passes add.
"""

import shutil
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpcompile.driver.artifact import Artifact
from mpcompile.driver.compare_engines import SECONDS, Arrays, Settings, call_of, engine_parity
from mpcompile.driver.run_plan import runtime_named
from mpcompile.errors import RuntimeMissing, UsageError
from mpcompile.export.onnx_export import Exported
from mpcompile.measure.layer_verdict import LayerVerdict, one_per_weight
from mpcompile.measure.timing import sample, speedup, timing
from mpcompile.pipeline.pass_manager import Observer
from mpcompile.recipe.schema import Recipe
from mpcompile.report.bench_report import BatchTimings, BenchReport, TimedEngine
from mpcompile.report.layer_counts import weight_owners
from mpcompile.report.schema import Parity
from mpcompile.runtimes import (
    Build,
    Engine,
    ReportsKernels,
    RunsGraph,
    Runtime,
    ShipsFile,
    TimesDevice,
    has_sparse_kernel,
)
from mpcompile.system.hardware import disturbances, environment, machine_state
from mpcompile.system.progress import Progress, stage_progress

DENSE, KERNELS_OFF, COMPRESSED, SHIPPED = "dense", "masked, kernels off", "compressed", "as shipped"
DENSE_QUANTIZED = "dense, 8 bits"
FOLDER = "bench"
PARITY_IMAGES = 8


def bench(folder: Path, settings: Settings, observe: Callable[[Progress], None] | None = None) -> BenchReport:
    """The benchmark of an output folder, which is also written to `bench/TARGET` in it. Raises a MpcompileError."""
    artifact = Artifact.open(folder)
    with stage_progress(observe, stages(artifact.recipe, settings)) as begin_stage:
        return _benched(artifact, settings, begin_stage)


def _benched(artifact: Artifact, settings: Settings, observe: Observer) -> BenchReport:
    """The benchmark of an artifact; its files replace those of an earlier benchmark of the same target."""
    recipe = artifact.recipe
    target = settings.target or recipe.target
    runtime = _runtime(target, recipe.precision, settings.threads)
    batches = settings.batches or recipe.timed_batches
    if recipe.batch is not None and set(batches) != {recipe.batch}:
        raise UsageError(f"the files have a fixed batch of {recipe.batch}; leave --batch out")
    if len(artifact.exported(artifact.onnx).input_names) > 1:
        raise UsageError("bench times models with one input; compile has timed this one (report.json, latency)")
    observe("verify")
    masks = artifact.verify()

    before, after = artifact.exported(artifact.dense_onnx), artifact.exported(artifact.onnx, masks)
    file = artifact.dense_quantized_onnx
    quantized = artifact.exported(file) if file else None
    software = ", ".join(f"{name} {number}" for name, number in runtime.versions().items())
    output = artifact.folder / FOLDER / target
    output.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target}.partial-", dir=output.parent) as temporary:
        partial_output = Path(temporary) / target
        partial_output.mkdir()
        build = Build(settings.threads, batches=batches, folder=partial_output)
        shipped = runtime.shipped(after, settings.threads) if isinstance(runtime, ShipsFile) else None
        comparison = compared(runtime, before, after, build, settings, observe, shipped, quantized)
        result = BenchReport(
            version=version("mpcompile"),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            model=artifact.report.model.arch,
            target=target,
            precision=recipe.precision,
            settings={
                "threads": str(settings.threads or "the runtime's choice"),
                "transfers": "counted" if settings.transfers else "not counted",
                "CUDA graph": "yes" if settings.graph else "no",
                "rounds within": f"{settings.seconds:g} s a batch",
            },
            environment=environment(runtime.versions(), comparison.device),
            baseline=f"the dense model of the same folder in {before.precision}, in {software}, same settings",
            arms=comparison.arms,
            meanings=comparison.meanings,
            parity=comparison.parity,
            batches=comparison.batches,
            verdicts=one_per_weight(comparison.verdicts, weight_owners(artifact.report.layers)),
            command=command(target, batches, settings),
        )
        result.write(partial_output)
        if output.exists():
            shutil.rmtree(output)
        partial_output.rename(output)
    return result


@dataclass(frozen=True, slots=True)
class Compared:
    """The engines that were built and their measurements. `meanings` describes each comparison by its key."""

    arms: tuple[TimedEngine, ...]
    meanings: dict[str, str]
    parity: tuple[Parity, ...]
    batches: tuple[BatchTimings, ...]
    verdicts: tuple[LayerVerdict, ...]
    device: str


def compared(
    runtime: Runtime,
    before: Exported,
    after: Exported,
    build: Build,
    settings: Settings,
    observe: Observer = lambda stage: None,
    shipped: tuple[Path, Engine] | None = None,
    quantized: Exported | None = None,
) -> Compared:
    """Engines of a dense and a compressed file, timed in interleaved rounds, and a verdict for each masked layer.

    Args:
        runtime: builds the engines.
        before: the dense ONNX file.
        after: the compressed ONNX file.
        build: the options of the engines; every batch size in it is timed, and files go to its folder.
        settings: how long to time, and whether transfers count.
        observe: called as each stage begins.
        shipped: the file with kernels selected at compile time and its engine, which is timed too; None if absent.
        quantized: the file of the dense model in 8 bits, which is timed too; None if absent.

    Raises RuntimeMissing, BuildError or ParityError.
    """
    observe("build")
    arms, engines = _built(runtime, before, after, build, quantized)
    if shipped is not None:
        what = "the file in the folder for this target, with the kernels that were selected at compile time"
        arms = (*arms, TimedEngine(name=SHIPPED, what=what, file=shipped[0].name))
        engines[SHIPPED] = shipped[1]
    images = _images(after, max(PARITY_IMAGES, min(build.batches)))
    files = {DENSE: before} | ({DENSE_QUANTIZED: quantized} if quantized else {})
    parity = tuple(
        engine_parity(engine, files.get(name, after), (images,), f"{name}: target {runtime.name}")
        for name, engine in engines.items()
    )
    rows = []
    for batch in build.batches:
        observe(f"batch {batch}")
        rows.append(_timed(engines, (_images(after, batch),), settings))
    with tempfile.TemporaryDirectory() as folder:
        verdicts = runtime.prepare(after, Path(folder), build).verdicts
    compressed = engines[COMPRESSED]
    if isinstance(compressed, ReportsKernels):
        verdicts = compressed.judged(verdicts, after.masks, _images(after, build.batches[-1]), engines.get(KERNELS_OFF))
    return Compared(
        arms, _meanings(engines, _replaces_dense(runtime, after)), parity, tuple(rows), verdicts, engines[DENSE].device
    )


def stages(recipe: Recipe, settings: Settings) -> tuple[str, ...]:
    """The names of the stages that `bench` reports to `observe`, in order."""
    batches = settings.batches or recipe.timed_batches
    return ("verify", "build", *(f"batch {batch}" for batch in batches))


def command(target: str, batches: Sequence[int], settings: Settings | None = None) -> str:
    """The command line of a benchmark with these settings; OUT stands for the output folder."""
    settings = settings or Settings()
    words = ["mpcompile bench OUT", f"--target {target}", f"--batch {','.join(map(str, batches))}"]
    words += [f"--threads {settings.threads}"] if settings.threads else []
    words += [f"--seconds {settings.seconds:g}"] if settings.seconds != SECONDS else []
    words += [] if settings.transfers else ["--no-transfers"]
    words += ["--cuda-graph"] if settings.graph else []
    return " ".join(words)


def _runtime(target: str, precision: str, threads: int | None) -> Runtime:
    """The runtime of a target. Raises RuntimeMissing if it does not run here, UsageError if it cannot be timed so."""
    runtime = runtime_named(target)
    if reason := runtime.missing() or runtime.idle():
        raise RuntimeMissing(f"target {target} cannot be timed here: {reason}")
    if isinstance(runtime, RunsGraph):
        raise UsageError(
            f"target {target} runs the graph in memory, not a file; compile with --target {target}, which times it"
        )
    if refused := runtime.refuses(precision, threads):
        raise UsageError(f"target {target}: {refused}")
    return runtime


def _built(
    runtime: Runtime, before: Exported, after: Exported, build: Build, quantized: Exported | None = None
) -> tuple[tuple[TimedEngine, ...], dict[str, Engine]]:
    """The engines and their descriptions: three if the runtime has a sparse kernel for one of the masks, else two.

    If the dense model in 8 bits has a file, there is one more.
    """
    native = _replaces_dense(runtime, after)
    without_kernels = Build(build.threads, sparse=False, batches=build.batches, folder=build.folder)
    engines: dict[str, Engine] = {DENSE: runtime.build(before, without_kernels)}
    arms = [TimedEngine(name=DENSE, what=f"the dense model in {before.precision}", file=before.onnx.name)]
    if quantized is not None:
        engines[DENSE_QUANTIZED] = runtime.build(quantized, build)  # the strongest baseline
        what = f"the dense model in {quantized.precision}{', native kernels allowed' if native else ''}"
        arms.append(TimedEngine(name=DENSE_QUANTIZED, what=what, file=quantized.onnx.name))
    if any(mask.nm is not None and has_sparse_kernel(runtime, mask.nm, after.precision) for mask in after.masks):
        engines[KERNELS_OFF] = runtime.build(after, without_kernels)
        what = f"the compressed model, {'native' if native else 'sparse'} kernels not allowed"
        arms.append(TimedEngine(name=KERNELS_OFF, what=what, file=after.onnx.name))
    engines[COMPRESSED] = runtime.build(after, build)
    what = "the compressed model"
    if after.masks:
        allowed = f", {'native' if native else 'sparse'} kernels allowed"
        what += allowed if KERNELS_OFF in engines else ", whose masked layers this target runs as dense"
    arms.append(TimedEngine(name=COMPRESSED, what=what, file=after.onnx.name))
    return tuple(arms), engines


def _replaces_dense(runtime: Runtime, exported: Exported) -> bool:
    """Whether the runtime's own kernels also run dense layers of this file: in int8, if it writes a file for them."""
    return exported.precision == "int8" and isinstance(runtime, ShipsFile)


def _meanings(builds: Collection[str], native: bool = False) -> dict[str, str]:
    """The description of each comparison between these engines, by its key "engine/baseline".

    With `native`, the runtime's own kernels also run dense layers.
    """
    descriptions = {
        f"{KERNELS_OFF}/{DENSE}": "the graph alone",
        f"{COMPRESSED}/{KERNELS_OFF}": "native kernels in all layers" if native else "sparse kernels alone",
        f"{COMPRESSED}/{DENSE}": "the total gain",
        f"{SHIPPED}/{DENSE}": "the gain of the file in the folder",
        f"{DENSE_QUANTIZED}/{DENSE}": "8 bits alone",
        f"{COMPRESSED}/{DENSE_QUANTIZED}": "the gain beside the dense model in 8 bits",
    }
    return {key: text for key, text in descriptions.items() if set(key.split("/")) <= set(builds)}


def _images(exported: Exported, batch: int) -> NDArray[np.float32]:
    """Standard normal noise (batch, c, h, w), as large as normalised pixels: latency does not depend on the values."""
    return np.random.default_rng(0).standard_normal((batch, *exported.image_shape)).astype(np.float32)


def _timed(engines: dict[str, Engine], inputs: Arrays, settings: Settings) -> BatchTimings:
    """The timings of all engines at one batch size."""
    calls = {name: call_of(engine, inputs, settings) for name, engine in engines.items()}
    on_gpu = any(isinstance(engine, TimesDevice) for engine in engines.values())
    conditions = [machine_state(on_gpu)]
    samples = sample(calls, settings.seconds, lambda: conditions.append(machine_state(on_gpu)))
    idle, before, after = conditions
    before = replace(before, load=idle.load)  # load without our own calls; clocks under load
    size = len(inputs[0])
    return BatchTimings(
        batch=size,
        timings={name: timing(times, size, engines[name].device) for name, times in samples.items()},
        samples_ms={name: tuple(times.tolist()) for name, times in samples.items()},
        comparisons={
            key: speedup(samples[key.partition("/")[2]], samples[key.partition("/")[0]], key.partition("/")[2])
            for key in _meanings(engines)
        },
        disturbances=disturbances(before, after),
        before=before,
        after=after,
    )
