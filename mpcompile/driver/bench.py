"""The front door of `mpcompile bench`: an output folder, timed on its target against the dense model.

Three builds take turns: A, the dense file; B, the compressed file with sparse kernels not allowed; C, the same with
them. B against A is what the graph alone is worth (merged tokens), C against B what sparse kernels are, and C against A
what the user gets. C chooses its kernels anew, on this machine; where the folder ships a file that has them chosen,
that is timed beside the three. All are the same precision, the same runtime and the same settings.
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
from mpcompile.driver.compare_engines import SECONDS, Settings, call_of, engine_parity
from mpcompile.driver.run_plan import runtime_named
from mpcompile.errors import RuntimeMissing, UsageError
from mpcompile.export.onnx_export import Exported
from mpcompile.measure.layer_verdict import LayerVerdict
from mpcompile.measure.timing import sample, speedup, timing
from mpcompile.pipeline.pass_manager import Observer
from mpcompile.recipe.schema import Recipe
from mpcompile.report.bench_report import BatchTimings, BenchReport, TimedEngine
from mpcompile.report.schema import Parity
from mpcompile.runtimes import Build, Engine, ReportsKernels, Runtime, ShipsFile, TimesDevice
from mpcompile.system.hardware import disturbances, environment, machine_state
from mpcompile.system.progress import Progress, stage_progress

DENSE, UNUSED, COMPRESSED, SHIPPED = "dense", "masked, kernels off", "compressed", "as shipped"


FOLDER = "bench"
PARITY_IMAGES = 8


def bench(folder: Path, settings: Settings, observe: Callable[[Progress], None] | None = None) -> BenchReport:
    """The benchmark of an output folder, written into its folder `bench/TARGET`. Raises a MpcompileError."""
    artifact = Artifact.open(folder)
    with stage_progress(observe, steps(artifact.recipe, settings)) as tell:
        return _benched(artifact, settings, tell)


def _benched(artifact: Artifact, settings: Settings, observe: Observer) -> BenchReport:
    """`bench`, of a folder that was opened."""
    recipe = artifact.recipe
    target = settings.target or recipe.target
    runtime = _runtime(target, recipe.precision, settings.threads)
    batches = settings.batches or recipe.timed_batches
    if recipe.batch is not None and set(batches) != {recipe.batch}:
        raise UsageError(f"the files have a fixed batch of {recipe.batch}; leave --batch out")
    observe("verify")
    masks = artifact.verify()

    before, after = artifact.exported(artifact.dense_onnx), artifact.exported(artifact.onnx, masks)
    output = artifact.folder / FOLDER / target
    output.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target}.partial-", dir=output.parent) as temporary:
        partial_output = Path(temporary) / target
        partial_output.mkdir()
        build = Build(settings.threads, batches=batches, folder=partial_output)
        shipped = runtime.shipped(after, settings.threads) if isinstance(runtime, ShipsFile) else None
        found = compared(runtime, before, after, build, settings, observe, shipped)
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
            environment=environment(runtime.versions(), found.device),
            baseline=f"the dense model of the same folder in {recipe.precision}, in {_spelt(runtime)}, same settings",
            arms=found.arms,
            meanings=found.meanings,
            parity=found.parity,
            batches=found.batches,
            verdicts=found.verdicts,
            command=command(target, batches, settings),
        )
        result.write(partial_output)
        if output.exists():
            shutil.rmtree(output)
        partial_output.rename(output)
    return result


@dataclass(frozen=True, slots=True)
class Compared:
    """What was built and timed; `meanings` says what each comparison stands for."""

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
) -> Compared:
    """A dense file and a compressed one, built and timed in turns at every batch of `build`, and what became of each
    masked layer. `shipped` is a file that was made of the compressed one before, and its engine, which takes turns with
    them. Files of the engines go into `build.folder`. Raises RuntimeMissing or BuildError.
    """
    observe("build")
    arms, engines = _built(runtime, before, after, build)
    if shipped is not None:
        what = "the file for this target as it lies in the folder, with the kernels that were chosen when it was made"
        arms = (*arms, TimedEngine(name=SHIPPED, what=what, file=shipped[0].name))
        engines[SHIPPED] = shipped[1]
    images = _images(after, max(PARITY_IMAGES, min(build.batches)))
    parity = tuple(
        engine_parity(engine, before if name == DENSE else after, images, f"{name}: target {runtime.name}")
        for name, engine in engines.items()
    )
    rows = []
    for batch in build.batches:
        observe(f"batch {batch}")
        rows.append(_timed(engines, _images(after, batch), settings))
    with tempfile.TemporaryDirectory() as folder:
        verdicts = runtime.prepare(after, Path(folder), build).verdicts
    judge = engines[COMPRESSED]
    if isinstance(judge, ReportsKernels):
        verdicts = judge.judged(verdicts, after.masks, _images(after, build.batches[-1]), engines.get(UNUSED))
    return Compared(arms, _meanings(engines), parity, tuple(rows), verdicts, engines[DENSE].device)


def steps(recipe: Recipe, settings: Settings) -> tuple[str, ...]:
    """The names of the stages that `bench` tells, in order."""
    batches = settings.batches or recipe.timed_batches
    return ("verify", "build", *(f"batch {batch}" for batch in batches))


def command(target: str, batches: Sequence[int], settings: Settings | None = None) -> str:
    """The command line that does this; OUT stands for the folder."""
    settings = settings or Settings()
    words = ["mpcompile bench OUT", f"--target {target}", f"--batch {','.join(map(str, batches))}"]
    words += [f"--threads {settings.threads}"] if settings.threads else []
    words += [f"--seconds {settings.seconds:g}"] if settings.seconds != SECONDS else []
    words += [] if settings.transfers else ["--no-transfers"]
    words += ["--cuda-graph"] if settings.graph else []
    return " ".join(words)


def _runtime(target: str, precision: str, threads: int | None) -> Runtime:
    """The runtime of a target, if it runs here. Raises UsageError or RuntimeMissing."""
    runtime = runtime_named(target)
    if reason := runtime.missing() or runtime.idle():
        raise RuntimeMissing(f"target {target} cannot be timed here: {reason}")
    if runtime.name == "eager":
        raise UsageError("target eager runs a graph in memory and no file; compile with --target eager, which times it")
    if refused := runtime.refuses(precision, threads):
        raise UsageError(f"target {target}: {refused}")
    return runtime


def _spelt(runtime: Runtime) -> str:
    return ", ".join(f"{name} {number}" for name, number in runtime.versions().items())


def _built(
    runtime: Runtime, before: Exported, after: Exported, build: Build
) -> tuple[tuple[TimedEngine, ...], dict[str, Engine]]:
    """The builds and their engines: two where the runtime has no sparse kernels, three where it has."""
    off = Build(build.threads, sparse=False, batches=build.batches, folder=build.folder)
    engines: dict[str, Engine] = {DENSE: runtime.build(before, off)}
    arms = [TimedEngine(name=DENSE, what="the dense model", file=before.onnx.name)]
    if any(mask.nm is not None and runtime.has_kernel(mask.nm) for mask in after.masks):
        engines[UNUSED] = runtime.build(after, off)
        arms.append(
            TimedEngine(name=UNUSED, what="the compressed model, sparse kernels not allowed", file=after.onnx.name)
        )
    engines[COMPRESSED] = runtime.build(after, build)
    what = "the compressed model"
    if after.masks:
        what += ", sparse kernels allowed" if UNUSED in engines else ", whose masked layers this target runs as dense"
    arms.append(TimedEngine(name=COMPRESSED, what=what, file=after.onnx.name))
    return tuple(arms), engines


def _meanings(builds: Collection[str]) -> dict[str, str]:
    """What each comparison of these builds stands for, by its key."""
    all_of_them = {
        f"{UNUSED}/{DENSE}": "the graph alone",
        f"{COMPRESSED}/{UNUSED}": "sparse kernels alone",
        f"{COMPRESSED}/{DENSE}": "what is gained in all",
        f"{SHIPPED}/{DENSE}": "what the file in the folder gains",
    }
    return {key: text for key, text in all_of_them.items() if set(key.split("/")) <= set(builds)}


def _images(exported: Exported, batch: int) -> NDArray[np.float32]:
    """A batch of noise about as large as normalised pixels: latency does not depend on what the numbers are."""
    return np.random.default_rng(0).standard_normal((batch, *exported.image_shape)).astype(np.float32)


def _timed(engines: dict[str, Engine], images: NDArray[np.float32], settings: Settings) -> BatchTimings:
    """One batch size, all builds in turns."""
    calls = {name: call_of(engine, images, settings) for name, engine in engines.items()}
    on_gpu = any(isinstance(engine, TimesDevice) for engine in engines.values())
    seen = [machine_state(on_gpu)]
    samples = sample(calls, settings.seconds, lambda: seen.append(machine_state(on_gpu)))
    cold, before, after = seen
    before = replace(before, load=cold.load)  # before the first call; the clocks are those of a machine at work
    size = len(images)
    return BatchTimings(
        batch=size,
        timings={name: timing(found, size, engines[name].device) for name, found in samples.items()},
        samples_ms={name: tuple(found.tolist()) for name, found in samples.items()},
        comparisons={
            key: speedup(samples[key.partition("/")[2]], samples[key.partition("/")[0]], key.partition("/")[2])
            for key in _meanings(engines)
        },
        disturbances=disturbances(before, after),
        before=before,
        after=after,
    )
