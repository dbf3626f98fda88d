"""`analyze`: a model's spectra, the plan of a budget, and the speed that each target would reach.

The model is not changed.
"""

from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from mpcompile.analysis.macs import Cost, cost
from mpcompile.analysis.spectrum import Fit, SpectrumFit
from mpcompile.data.images import Data
from mpcompile.driver.forecast import Forecast, forecast
from mpcompile.driver.inputs import headed, loaded_from
from mpcompile.driver.part import PART_HEAD, captured_run
from mpcompile.driver.run_plan import build_pass
from mpcompile.errors import UsageError
from mpcompile.frontend.load_model import Request
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.ir.precision import Precision
from mpcompile.ir.source import Source
from mpcompile.passes.mp_budget.mp_budget import MPBudget, fit_spectra
from mpcompile.passes.quantize.policy import quantizable
from mpcompile.pipeline.pass_manager import Observer
from mpcompile.recipe.schema import DataChoice, Step
from mpcompile.report.schema import Value
from mpcompile.report.spectrum_plots import make_folder, write_plots
from mpcompile.runtimes import RUNTIMES
from mpcompile.system.hardware import environment
from mpcompile.system.progress import Progress, stage_progress

FORECAST: tuple[Precision, ...] = ("fp32", "int8")
STAGES = ("load", "capture", "spectra", "budget")


class LayerAnalysis(Value):
    """One layer: its spectrum and its planned pattern, each with the reason where there is none.

    `null` is the fit of the same weight with its entries shuffled.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    macs: float  # of the dense layer, per image
    macs_share: float  # of the dense model, in [0, 1]
    fit: Fit | None
    null: Fit | None
    unfitted: str | None  # why there is no fit
    pattern: NM | None
    reason: str | None  # why the layer stays dense
    unquantized: str | None = None  # why the layer stays in floating point with --precision int8; None: it is quantised


class ModelAnalysis(Value):
    """The spectra of a model's layers, the plan of a budget, and a forecast of that plan for each target."""

    schema_version: int = 1
    version: str  # of mpcompile
    model: Source
    environment: dict[str, str]
    signal: str
    dense_macs: float  # per image
    dense_weight_bytes: float
    planned_macs: float  # if every planned pattern has a kernel
    planned_weight_bytes: float  # packed
    layers: tuple[LayerAnalysis, ...]
    forecasts: tuple[Forecast, ...]
    notes: tuple[str, ...] = ()  # about the images
    precision: Precision = "fp32"  # of the compiled file that is forecast


def analyze(
    model: str | Path | nn.Module | Request,
    budget: MPBudget | None = None,
    *,
    data: str | Path | Data | None = None,
    choice: DataChoice | None = None,
    head: str = "auto",
    submodule: str | None = None,
    plots: str | Path | None = None,
    precision: Precision = "fp32",
    observe: Callable[[Progress], None] | None = None,
) -> ModelAnalysis:
    """The analysis of a model, which is not changed. Raises a MpcompileError.

    Args:
        model: a file, a name, a module, or a `Request`.
        budget: plans the patterns; by default 2:4 on every eligible layer.
        data: images; needed for budget signals that use activations.
        choice: how `data` is divided into splits.
        head: how outputs become a decision (`HeadChoice.parse`); it says which labels the images have.
        submodule: a shell pattern over names of modules; the part that it names is analysed alone.
        plots: a folder, where one SVG per layer and an overview are written.
        precision: of the compiled file that is forecast, fp32 or int8.
        observe: called as each stage and each step of a stage begins.
    """
    if precision not in FORECAST:
        raise UsageError(f"analyze forecasts fp32 and int8, and the precision is {precision}; give int8 or fp32")
    if plots is not None:
        make_folder(Path(plots))  # before the work, not after it
    with stage_progress(observe, STAGES) as begin_stage:
        return _analysis(
            model, budget or MPBudget(), data, choice or DataChoice(), head, submodule, plots, precision, begin_stage
        )


def _analysis(
    model: str | Path | nn.Module | Request,
    budget: MPBudget,
    data: str | Path | Data | None,
    choice: DataChoice,
    head: str,
    submodule: str | None,
    plots: str | Path | None,
    precision: Precision,
    observe: Observer,
) -> ModelAnalysis:
    """The result of `analyze`, with all defaults resolved."""
    observe("load")
    loaded, request = loaded_from(model)
    observe("capture")
    dense, images, part = captured_run(loaded, request, data, choice, head, submodule)
    dense, images = headed(dense, images, PART_HEAD if part else head)
    counted = cost(dense)
    observe("spectra")
    fits = fit_spectra(dense, null=budget.null, level=budget.level, seed=budget.seed)
    observe("budget")
    planned = budget.planned(dense, images.for_passes(), fits)
    if plots is not None:
        write_plots({name: fit for name, fit in fits.items() if isinstance(fit, SpectrumFit)}, Path(plots))
    patterns = {name: plan.pattern for name, plan in planned.plan.items() if plan.pattern is not None}
    in_float = quantizable(planned)
    quantized = [name for name, reason in in_float.items() if reason is None]
    return ModelAnalysis(
        version=version("mpcompile"),
        model=loaded.source,
        notes=images.notes,
        environment=environment({name: version(name) for name in ("torch", "numpy", "scipy")}, "cpu"),
        signal=budget.signal,
        dense_macs=counted.macs,
        dense_weight_bytes=counted.weight_bytes({}),
        planned_macs=counted.executed_macs(patterns),
        planned_weight_bytes=counted.weight_bytes(patterns),
        layers=tuple(_rows(planned, counted, fits, in_float)),
        forecasts=tuple(forecast(target, planned, counted, patterns, precision, quantized) for target in RUNTIMES),
        precision=precision,
    )


def budget_from(params: Mapping[str, Any]) -> MPBudget:
    """The budget pass with parameters as a recipe writes them. Raises UsageError if one is unknown or not valid."""
    step = build_pass(Step(name=MPBudget.name, params=dict(params)))
    assert isinstance(step, MPBudget)
    return step


def _rows(
    planned: Model, counted: Cost, fits: Mapping[str, SpectrumFit | str], in_float: Mapping[str, str | None]
) -> Iterator[LayerAnalysis]:
    """One row for each layer with a weight, in order of definition. `in_float` has the reasons of `quantizable`."""
    for name, layer in planned.layers():
        fit, plan = fits[name], planned.plan_of(name)
        fitted = fit if isinstance(fit, SpectrumFit) else None
        yield LayerAnalysis(
            name=name,
            kind=type(layer).__name__,
            shape=tuple(layer.weight.shape),
            macs=counted.layers[name],
            macs_share=counted.layers[name] / counted.macs,
            fit=fitted.fit if fitted else None,
            null=fitted.null if fitted else None,
            unfitted=fit if isinstance(fit, str) else None,
            pattern=plan.pattern,
            reason=plan.skipped,
            unquantized=in_float[name],
        )
