"""`tune`: measures candidate recipes and returns the fastest one within the accuracy limit.

mpcompile/driver/recipe_search.py decides which recipes are tried, and in which order. Here each recipe is run with the
calibration set and measured on validation images; its engine and the dense model's, in the same runtime, are timed in
interleaved rounds. Held-out images are not used: only the accuracy gate evaluates them, once, on the chosen recipe.
"""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpcompile.analysis.macs import Cost, cost
from mpcompile.data.images import Data, Split
from mpcompile.data.metric_values import joined
from mpcompile.driver.compare_engines import arrays, interleaved_times_ms
from mpcompile.driver.quantized_baselines import runtime_baselines
from mpcompile.driver.recipe_search import Candidate, fastest, paths_of, search, within_limit
from mpcompile.driver.run_plan import RunPlan, plan_of
from mpcompile.errors import MpcompileError, UsageError
from mpcompile.export.onnx_export import Lowered
from mpcompile.ir.head import Head, head_for
from mpcompile.ir.model import Model
from mpcompile.measure.timing import Speedup, speedup
from mpcompile.pipeline.pass_manager import Pass, PassManager
from mpcompile.pipeline.pass_record import Effect
from mpcompile.recipe.schema import Recipe
from mpcompile.report.search_schema import Point, Tuning
from mpcompile.runtimes import Build, Engine
from mpcompile.system.progress import report_found, tracked


@dataclass(frozen=True)
class Reference:
    """The baseline of all measurements: the dense model in the target's runtime."""

    exported: Lowered
    engine: Engine
    hits: NDArray[np.float64]  # (images,): 100 for each validation image that is classified correctly, or the metric
    cost: Cost


@dataclass(frozen=True)
class Trial:
    """Runs candidate recipes on one model and measures them."""

    recipe: Recipe
    plan: RunPlan
    limit: float  # largest drop, in points of top-1 or units of the metric
    dense: Model
    data: Data
    build: Build
    folder: Path  # for temporary files
    reference: Reference

    def point(self, candidate: Candidate) -> Point:
        """The measurements of a candidate. If its recipe fails, `failed` is the reason."""
        try:
            passes = passes_to_last_change(plan_of(candidate.recipe).passes)
            model, _ = PassManager(passes).run(self.dense, self.data, device=self.plan.device)
            exported = self.plan.lower(model, self.folder / "model.onnx", like=self.reference.exported)
            engine = self.plan.build_engine(exported, self.build)
        except MpcompileError as error:
            return Point(candidate.name, failed=" ".join(str(error).split()))
        macs = cost(model).executed_macs(model.patterns()) / self.reference.cost.macs
        return self._measured(candidate.name, engine, macs)

    def references(self) -> tuple[Point, ...]:
        """The measurements of each int8 version of the dense model; empty if the runtime has no quantised baselines."""
        baselines = runtime_baselines(self.plan, self.reference.exported, self.build, self.data, self.folder)
        return tuple(
            Point(row.name, failed=row.failed)
            if engine is None
            else replace(self._measured(row.name, engine, None), method=row.method)
            for row, engine in ((baseline.row, baseline.engine) for baseline in baselines)
        )

    def _measured(self, name: str, engine: Engine, macs: float | None) -> Point:
        """Accuracy and speed of an engine. Drop and error are paired, in points of top-1 or units of the metric."""
        losses = self.reference.hits - points(engine, self.data.validation, self.dense.head)
        drop, error = float(losses.mean()), float(losses.std()) / math.sqrt(len(losses))
        batches = () if self.plan.idle else self.recipe.timed_batches
        speedups = tuple(self._speedup(engine, batch) for batch in batches)
        return Point(name, macs, drop, error, speedups, within_limit(drop, error, self.limit))

    def _speedup(self, engine: Engine, batch: int) -> Speedup:
        """The speedup of an engine over the dense model's."""
        engines, example = {"dense": self.reference.engine, "tried": engine}, arrays(self.dense.example_inputs)
        samples = interleaved_times_ms(engines, self.data.validation, example, batch, self.recipe.bench.seconds)
        return speedup(samples["dense"], samples["tried"], "dense")


@dataclass(frozen=True)
class SearchResult:
    """The chosen recipe, the record of the search, and the recipe of each of its points; all without `tune`."""

    recipe: Recipe
    tuning: Tuning
    tried: tuple[Recipe, ...]


def search_recipe(recipe: Recipe, dense: Model, data: Data) -> SearchResult:
    """The result of a search: the chosen recipe is a variant of the given one.

    The record of the search is reported as `found` after each recipe, with nothing chosen yet.

    Raises UsageError if the recipe has nothing to search over or no accuracy limit, or if there are no labelled
    validation images.
    """
    limit, options = recipe.gates.max_drop, recipe.tune
    if options is None or limit is None:
        raise UsageError("tune needs a limit on the loss of accuracy; give --max-drop (gates.max_drop)")
    if not len(data.validation) or not data.validation.judged:
        raise UsageError(
            f"tune measures on labelled validation images and has none; {'; '.join(data.notes) or 'give --data'}"
        )
    images, plan = data.for_passes(), plan_of(recipe)
    first = [Candidate("as written, layers restored", recipe)] if recipe.step("restore") else []
    counted = cost(dense)
    paths = paths_of(recipe.without("restore"), lambda base: least_macs(base, dense, counted, images))
    steps = iter(tracked(range(options.evaluations), lambda index: f"recipe {index + 1}", "recipes"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build = plan.build_options(folder)
        exported = plan.lower(dense, folder / "dense.onnx")
        engine = plan.build_engine(exported, build)
        reference = Reference(exported, engine, points(engine, images.validation, dense.head), counted)
        trial = Trial(recipe, plan, limit, dense, images, build, folder, reference)

        record = Tuning(
            limit=limit,
            allowed=options.evaluations,
            images=len(data.validation),
            batches=() if plan.idle else recipe.timed_batches,
            points=(),
            chosen="",
            metric=None if data.validation.metric is None else data.validation.metric.name,
        )

        def evaluate(candidate: Candidate) -> Point:
            nonlocal record
            next(steps)
            point = trial.point(candidate)
            record = replace(record, points=(*record.points, point))
            report_found(record)
            return point

        tried = search(paths, evaluate, options.evaluations, first)
        chosen, point = fastest(tried)
        record = replace(record, chosen=point.name, references=trial.references())
    recipes = [candidate.recipe.model_copy(update={"tune": None}) for candidate in (chosen, *(one for one, _ in tried))]
    return SearchResult(recipes[0], record, tuple(recipes[1:]))


def least_macs(recipe: Recipe, dense: Model, counted: Cost, data: Data) -> float:
    """The share of dense multiply-accumulates, in [0, 1], that a recipe's budget leaves, without token merging."""
    step = recipe.step("mp-budget")
    if step is not None and step.params.get("macs") is not None:
        return float(step.params["macs"])
    passes = [step for step in plan_of(recipe).passes if step.name == "mp-budget"]
    planned, _ = PassManager(passes).run(dense, data)
    patterns = {name: layer.pattern for name, layer in planned.plan.items() if layer.pattern is not None}
    return counted.executed_macs(patterns) / counted.macs


def passes_to_last_change(passes: Sequence[Pass]) -> tuple[Pass, ...]:
    """The passes up to the last one that changes the model. Analyses of the result, such as `certify`, are left out."""
    last = max((index for index, step in enumerate(passes) if step.effect is not Effect.ANALYSIS), default=-1)
    return tuple(passes[: last + 1])


def points(engine: Engine, images: Split, head: Head | None) -> NDArray[np.float64]:
    """The metric of each image (n,), or of each batch; without a metric 100 if the engine's decision is the label."""
    if images.metric is not None:
        pairs = zip(images.batches(), images.targets(), strict=True)
        return joined([images.metric.of_batch(engine(x.numpy()), goal) for (x, _), goal in pairs])[0]
    return np.where(hits(engine, images, head), 100.0, 0.0)


def hits(engine: Engine, images: Split, head: Head | None) -> NDArray[np.bool_]:
    """For each labelled image (n,), whether the engine's decision is its label."""
    batches = []
    for inputs, labels in images.announced():
        outputs = engine(*arrays(inputs))
        batches.append(head_for(head, outputs).right(outputs, labels.numpy()))
    return np.concatenate(batches)
