"""The dense models in 8 bits that a compressed model in 8 bits is compared with, and the loss of the masks alone.

A user chooses between the dense model in 8 bits and the compressed one. So the strongest dense models are made: by the
recipe's own pass `quantize` without masks, and by the target's own tools. They are evaluated on the same images, and
timed in the same interleaved rounds.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpcompile.data.images import Data, Split
from mpcompile.driver.artifact import dense_quantized_file
from mpcompile.driver.compare_engines import arrays
from mpcompile.driver.quantization import DENSE_QUANTIZED, quantizes_alone
from mpcompile.driver.run_plan import RunPlan
from mpcompile.export.onnx_export import Exported, Lowered
from mpcompile.ir.head import Head
from mpcompile.ir.model import Model
from mpcompile.ir.precision import QUANTIZED
from mpcompile.measure.accuracy import Run, compare
from mpcompile.measure.timing import Speedup, speedup, timing
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.report.quantized_schema import Variant
from mpcompile.runtimes import Build, Engine, HasQuantizedBaselines
from mpcompile.runtimes.ort.session import OrtEngine, cpu_engine

QUANTISATION_IMAGES = 64  # of the calibration set, for the target's own tools
Outputs = Sequence[NDArray[np.float32]]  # of a split, batch by batch
Samples = Mapping[str, NDArray[np.float64]]  # milliseconds per call of each engine (rounds,)


@dataclass(frozen=True, slots=True)
class Baseline:
    """A dense model in 8 bits: its row of the report, and its engine. Without an engine, the row has the reason."""

    row: Variant
    engine: Engine | None = None


def writes_dense(plan: RunPlan) -> bool:
    """Whether the output folder has the dense model in 8 bits as a file of its own.

    False if the recipe is not in 8 bits, or if `quantize` is its only pass that changes the model: the compressed model
    is then the dense model in 8 bits.
    """
    return plan.recipe.precision in QUANTIZED and not quantizes_alone(plan.passes)


def part_in_float(plan: RunPlan) -> str:
    """The name of what the passes before `quantize` do, such as `masks alone`."""
    kinds = {"nm-mask": "masks", "tome": "merged tokens", "distill": "training", "polish": "training"}
    found = list(dict.fromkeys(kind for name, kind in kinds.items() if plan.recipe.step(name)))
    return f"{' and '.join(found) or 'other passes'} alone"


def lower_dense(plan: RunPlan, dense: Model, data: Data, folder: Path, metadata: Mapping[str, str]) -> Lowered:
    """The dense model through the recipe's passes of the dense model in 8 bits alone, as an ONNX file in the folder."""
    steps = [step for step in plan.passes if isinstance(step, DENSE_QUANTIZED)]
    model, _ = PassManager(steps).run(dense, data, device=plan.device)
    return plan.lower(model, folder / dense_quantized_file(plan.recipe), metadata)


def dense_baselines(
    plan: RunPlan, exported: Exported, ours: Engine | None, build: Build, data: Data, folder: Path
) -> tuple[Baseline, ...]:
    """Ours and those of the target's own tools; empty if the recipe is not in 8 bits.

    Args:
        plan: recipe and runtime.
        exported: the dense ONNX file, in fp32.
        ours: the engine of the dense model in 8 bits of the output folder; None if it has none.
        build: options of the engines.
        data: its calibration set has the images for the target's tools.
        folder: where the target's tools write their files; they must last as long as the engines.
    """
    precision = plan.recipe.precision
    if precision not in QUANTIZED:
        return ()
    found = runtime_baselines(plan, exported, build, data, folder)
    if ours is None:
        return found
    method = "the pass quantize of the recipe, without masks"
    if isinstance(ours, OrtEngine) and ours.native:
        method += f", on the native kernels where a measurement selected them ({ours.file.name})"
    own = Variant(f"{precision}, mpcompile", method=method, file=dense_quantized_file(plan.recipe))
    return (Baseline(own, ours), *found)


def runtime_baselines(
    plan: RunPlan, exported: Exported, build: Build, data: Data, folder: Path
) -> tuple[Baseline, ...]:
    """The dense model in 8 bits by the target's own tools; empty if the target has none or does not run here.

    The arguments are those of `dense_baselines`.
    """
    runtime, calibration = plan.runtime, data.calibration
    if plan.idle or not isinstance(runtime, HasQuantizedBaselines):
        return ()
    images = calibration.first(min(QUANTISATION_IMAGES, len(calibration))).numpy()
    return tuple(
        Baseline(Variant(name, failed=found))
        if isinstance(found, str)
        else Baseline(Variant(name, method=found.method), found.engine)
        for name, found in runtime.references(exported, build, images, folder).items()
    )


def outputs_in_float(plan: RunPlan, model: Model, images: Split, path: Path) -> Outputs:
    """The outputs of a model without quantizers for all images, from ONNX Runtime; the file is written to `path`."""
    return outputs_of(cpu_engine(plan.lower(model, path)), images) if len(images) else ()


def outputs_of(engine: Run, images: Split) -> Outputs:
    """The outputs of an engine for all images of a split, batch by batch."""
    return tuple(engine(*arrays(inputs)) for inputs, _ in images.announced())


def replayed(outputs: Outputs) -> Run:
    """An engine that returns recorded outputs, one batch for each call."""
    recorded: Iterator[NDArray[np.float32]] = iter(outputs)
    return lambda images: next(recorded)


def evaluated(row: Variant, engine: Run, dense: Outputs, images: Split, head: Head | None) -> Variant:
    """The row with the comparison of an engine with the recorded outputs of the dense model."""
    if not len(images):
        return row
    found = compare(replayed(dense), engine, images, head=head)
    top1 = found.compressed.top1 if found.compressed else None
    return replace(
        row,
        top1=top1,
        agreement=found.agreement,
        logit_shift_mean=found.logit_shift_mean,
        relative_error=found.values.relative_error_mean if found.values else None,
        cosine=found.values.cosine_mean if found.values else None,
    )


def all_evaluated(
    baselines: Sequence[Baseline], dense: Outputs, images: Split, head: Head | None
) -> tuple[Baseline, ...]:
    """The baselines, those with an engine evaluated on the images."""
    return tuple(
        b if b.engine is None else replace(b, row=evaluated(b.row, b.engine, dense, images, head)) for b in baselines
    )


def timed(baselines: Sequence[Baseline], samples: Samples, batch: int) -> tuple[Baseline, ...]:
    """The baselines with the timing and the speedup over `dense` at one more batch size."""

    def with_times(baseline: Baseline, engine: Engine) -> Baseline:
        row, own = baseline.row, samples[baseline.row.name]
        ratio = speedup(samples["dense"], own, "dense")
        timings = (*row.timings, timing(own, batch, engine.device))
        return replace(baseline, row=replace(row, timings=timings, speedups=(*row.speedups, ratio)))

    return tuple(b if b.engine is None else with_times(b, b.engine) for b in baselines)


def over_fastest(baselines: Sequence[Baseline], samples: Samples) -> Speedup:
    """The speedup of `compressed` over the baseline with the smallest median, which it names."""
    names = [b.row.name for b in baselines if b.engine is not None]
    fastest = min(names, key=lambda name: float(np.median(samples[name])))
    return speedup(samples[fastest], samples["compressed"], fastest)
