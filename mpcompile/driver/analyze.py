"""The other front door: model -> ModelAnalysis of its layers and what a budget would plan. It changes nothing."""

from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from mpcompile.analysis.macs import Cost, cost
from mpcompile.analysis.spectrum import Fit, SpectrumFit
from mpcompile.data.images import Data
from mpcompile.driver.inputs import data_for, loaded_from
from mpcompile.driver.run_plan import build_pass
from mpcompile.frontend.capture import capture
from mpcompile.frontend.load_model import Request
from mpcompile.ir.model import Model, Source
from mpcompile.ir.pattern import NM
from mpcompile.measure.timing import Speedup
from mpcompile.passes.mp_budget.mp_budget import MPBudget, fit_spectra
from mpcompile.pipeline.pass_manager import Observer
from mpcompile.recipe.schema import DataChoice, Step
from mpcompile.report.schema import Value
from mpcompile.report.spectrum_plots import make_folder, write_plots
from mpcompile.runtimes import RUNTIMES, GemmShape, PredictsSpeed
from mpcompile.system.hardware import environment
from mpcompile.system.progress import Progress, stage_progress

STAGES = ("load", "capture", "spectra", "budget")


class LayerAnalysis(Value):
    """One layer: its fit and that of its null, or why it has none; its pattern, or why it stays dense."""

    name: str
    kind: str
    shape: tuple[int, ...]
    macs: float  # an image, dense
    macs_share: float  # of the whole model's
    fit: Fit | None
    null: Fit | None
    unfitted: str | None
    pattern: NM | None
    reason: str | None


class Forecast(Value):
    """What a target would execute of the plan.

    `accelerated` are the planned patterns that it has kernels for; the others run as dense. `speedup_bound` is the
    ratio of multiply-accumulates, by counting alone. `layers` is how many times as fast as dense each planned layer
    will be, where the target can try a product like it here: 1 where `measured`, the speedup of that product with its
    interval, is not surely above 1, since the layer then runs as dense. `speedup` is what `layers` come to for the
    whole model if everything takes as long as its multiply-accumulates say.
    """

    target: str
    accelerated: tuple[NM, ...]
    macs: float
    weight_bytes: float
    speedup_bound: float
    layers: dict[str, float]
    measured: dict[str, Speedup]
    speedup: float | None


class ModelAnalysis(Value):
    """The spectra of a model's layers, a plan by the budget, and what that plan comes to."""

    schema_version: int = 1
    version: str  # of mpcompile
    model: Source
    environment: dict[str, str]
    signal: str
    dense_macs: float  # an image
    dense_weight_bytes: float
    planned_macs: float  # if every planned pattern has a kernel
    planned_weight_bytes: float  # packed
    layers: tuple[LayerAnalysis, ...]
    forecasts: tuple[Forecast, ...]


def analyze(
    model: str | Path | nn.Module | Request,
    budget: MPBudget | None = None,
    *,
    data: str | Path | Data | None = None,
    choice: DataChoice | None = None,
    plots: str | Path | None = None,
    observe: Callable[[Progress], None] | None = None,
) -> ModelAnalysis:
    """The analysis; the model is left as it was.

    `budget` says what to plan (by default 2:4 on every eligible layer). `data` is needed for the signals that look at
    activations. With `plots`, a folder, one SVG a layer and an overview are written there. Raises a MpcompileError.
    """
    if plots is not None:
        make_folder(Path(plots))  # before the work, not after it
    with stage_progress(observe, STAGES) as tell:
        return _analysis(model, budget or MPBudget(), data, choice or DataChoice(), plots, tell)


def _analysis(
    model: str | Path | nn.Module | Request,
    budget: MPBudget,
    data: str | Path | Data | None,
    choice: DataChoice,
    plots: str | Path | None,
    observe: Observer,
) -> ModelAnalysis:
    """`analyze`, with every default filled in."""
    observe("load")
    loaded, leaves = loaded_from(model)
    observe("capture")
    dense = capture(loaded.module, loaded.source, leaves=leaves)
    images = data_for(data, dense, choice)
    counted = cost(dense)
    observe("spectra")
    fits = fit_spectra(dense, null=budget.null, level=budget.level, seed=budget.seed)
    observe("budget")
    planned = budget.planned(dense, images.for_passes(), fits)
    if plots is not None:
        write_plots({name: found for name, found in fits.items() if isinstance(found, SpectrumFit)}, Path(plots))
    patterns = {name: plan.pattern for name, plan in planned.plan.items() if plan.pattern is not None}
    return ModelAnalysis(
        version=version("mpcompile"),
        model=loaded.source,
        environment=environment({name: version(name) for name in ("torch", "numpy", "scipy")}, "cpu"),
        signal=budget.signal,
        dense_macs=counted.macs,
        dense_weight_bytes=counted.weight_bytes({}),
        planned_macs=counted.executed_macs(patterns),
        planned_weight_bytes=counted.weight_bytes(patterns),
        layers=tuple(_rows(planned, counted, fits)),
        forecasts=tuple(_forecast(target, planned, counted, patterns) for target in RUNTIMES),
    )


def budget_from(params: Mapping[str, Any]) -> MPBudget:
    """The budget pass with these parameters, as a recipe would give them. Raises UsageError."""
    step = build_pass(Step(name=MPBudget.name, params=dict(params)))
    assert isinstance(step, MPBudget)
    return step


def _rows(planned: Model, counted: Cost, fits: Mapping[str, SpectrumFit | str]) -> Iterator[LayerAnalysis]:
    """A row for each layer that multiplies by weights, in order of definition."""
    for name, layer in planned.layers():
        found, plan = fits[name], planned.plan_of(name)
        fitted = found if isinstance(found, SpectrumFit) else None
        yield LayerAnalysis(
            name=name,
            kind=type(layer).__name__,
            shape=tuple(layer.weight.shape),
            macs=counted.layers[name],
            macs_share=counted.layers[name] / counted.macs,
            fit=fitted.fit if fitted else None,
            null=fitted.null if fitted else None,
            unfitted=found if isinstance(found, str) else None,
            pattern=plan.pattern,
            reason=plan.skipped,
        )


def _forecast(target: str, model: Model, counted: Cost, patterns: Mapping[str, NM]) -> Forecast:
    """What a target executes: layers whose pattern it has no kernel for are dense."""
    runtime = RUNTIMES[target]
    fast = {name: pattern for name, pattern in patterns.items() if runtime.has_kernel(pattern)}
    macs = counted.executed_macs(fast)
    measured = runtime.predicted(_products(model, counted, fast)) if isinstance(runtime, PredictsSpeed) else {}
    layers = {name: found.ratio if found.faster else 1.0 for name, found in measured.items()}
    executed = counted.macs - sum(counted.layers[name] * (1 - 1 / ratio) for name, ratio in layers.items())
    return Forecast(
        target=target,
        accelerated=tuple(sorted(set(fast.values()), key=str)),
        macs=macs,
        weight_bytes=counted.weight_bytes(fast),
        speedup_bound=counted.macs / macs,
        layers=layers,
        measured=dict(measured),
        speedup=counted.macs / executed if layers else None,
    )


def _products(model: Model, counted: Cost, patterns: Mapping[str, NM]) -> dict[str, GemmShape]:
    """The Linear layers with these patterns as products; what a convolution costs depends on its neighbours."""
    found = {}
    for name, pattern in patterns.items():
        layer = model.layer(name)
        if isinstance(layer, nn.Linear):
            out, in_ = layer.weight.shape
            found[name] = GemmShape(out, in_, max(1, round(counted.layers[name] / (out * in_))), pattern)
    return found
