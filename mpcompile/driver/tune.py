"""The tuning loop: a recipe that leaves freedom -> the fastest recipe within its limit on accuracy, and what was tried.

What is tried, and in which order, is decided in mpcompile/driver/recipe_search.py; here each recipe is carried out on
calibration images and measured on validation images, against the dense model in the same runtime, in turns. Held-out
images are not touched: the gate asks them once, about the recipe that was taken.
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
from mpcompile.driver.compare_engines import in_turns
from mpcompile.driver.recipe_search import Candidate, fastest, held, paths_of, search
from mpcompile.driver.run_plan import RunPlan, build_of, engine_of, lowered, plan_of
from mpcompile.errors import MpcompileError, UsageError
from mpcompile.export.onnx_export import Lowered
from mpcompile.ir.model import Model
from mpcompile.measure.timing import Speedup, speedup
from mpcompile.pipeline.pass_manager import Effect, Pass, PassManager
from mpcompile.recipe.schema import Recipe
from mpcompile.report.search_schema import Point, Tuning
from mpcompile.runtimes import Build, Engine, HasQuantizedBaselines
from mpcompile.system.progress import tracked

QUANTISED_ON = 64  # calibration images that a quantised reference gets


@dataclass(frozen=True)
class Reference:
    """What all is measured against: the dense model in the target's runtime, and the images that it gets right."""

    exported: Lowered
    engine: Engine
    hits: NDArray[np.bool_]
    cost: Cost


@dataclass(frozen=True)
class Trial:
    """Carries recipes out on one model and measures them; files go into the folder of `build`."""

    recipe: Recipe
    plan: RunPlan
    limit: float  # points of top-1
    dense: Model
    data: Data
    build: Build
    folder: Path
    reference: Reference

    def point(self, candidate: Candidate) -> Point:
        """What a recipe makes of the model; a recipe that fails is a point that says why."""
        try:
            model, _ = PassManager(deciding(plan_of(candidate.recipe).passes)).run(self.dense, self.data)
            engine = engine_of(self.plan, lowered(self.recipe, model, self.folder / "model.onnx"), self.build)
        except MpcompileError as error:
            return Point(candidate.name, failed=" ".join(str(error).split()))
        macs = cost(model).executed_macs(model.patterns()) / self.reference.cost.macs
        return self._measured(candidate.name, engine, macs)

    def references(self) -> tuple[Point, ...]:
        """The dense model as the runtime would quantise it, where it can."""
        runtime, calibration = self.plan.runtime, self.data.calibration
        if self.plan.idle or not isinstance(runtime, HasQuantizedBaselines):
            return ()
        images = calibration.first(min(QUANTISED_ON, len(calibration))).numpy()
        made = runtime.references(self.reference.exported, self.build, images, self.folder)
        return tuple(
            Point(name, failed=found)
            if isinstance(found, str)
            else replace(self._measured(name, found.engine, None), method=found.method)
            for name, found in made.items()
        )

    def _measured(self, name: str, engine: Engine, macs: float | None) -> Point:
        lost = self.reference.hits.astype(float) - hits(engine, self.data.validation)
        drop, error = 100 * float(lost.mean()), 100 * float(lost.std()) / math.sqrt(len(lost))
        batches = () if self.plan.idle else self.recipe.timed_batches
        speedups = tuple(self._speedup(engine, batch) for batch in batches)
        return Point(name, macs, drop, error, speedups, held(drop, error, self.limit))

    def _speedup(self, engine: Engine, batch: int) -> Speedup:
        engines, example = {"dense": self.reference.engine, "tried": engine}, self.dense.example.numpy()
        samples = in_turns(engines, self.data.validation, example, batch, self.recipe.bench.seconds)
        return speedup(samples["dense"], samples["tried"], "dense")


def tuned(recipe: Recipe, dense: Model, data: Data) -> tuple[Recipe, Tuning]:
    """The recipe to carry out, which is the given one with other passes and no search, and the record of the search.

    Raises UsageError where there is nothing to search over, no limit, or no labelled validation images.
    """
    limit, asked = recipe.gates.max_drop, recipe.tune
    if asked is None or limit is None:
        raise UsageError("tune needs a limit on the loss of accuracy; give --max-drop (gates.max_drop)")
    if not len(data.validation) or not data.validation.labelled:
        raise UsageError(
            f"tune measures on labelled validation images and has none; {'; '.join(data.notes) or 'give --data'}"
        )
    seen, plan = data.for_passes(), plan_of(recipe)
    first = [Candidate("as written, layers taken back", recipe)] if recipe.step("restore") else []
    counted = cost(dense)
    paths = paths_of(recipe.without("restore"), lambda given: least_macs(given, dense, counted, seen))
    steps = iter(tracked(range(asked.evaluations), lambda place: f"recipe {place + 1}"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build = build_of(recipe, folder)
        exported = lowered(recipe, dense, folder / "dense.onnx")
        engine = engine_of(plan, exported, build)
        reference = Reference(exported, engine, hits(engine, seen.validation), counted)
        trial = Trial(recipe, plan, limit, dense, seen, build, folder, reference)

        def evaluate(candidate: Candidate) -> Point:
            next(steps)
            return trial.point(candidate)

        tried = search(paths, evaluate, asked.evaluations, first)
        chosen, point = fastest(tried)
        references = trial.references()
    found = Tuning(
        limit=limit,
        allowed=asked.evaluations,
        images=len(data.validation),
        batches=() if plan.idle else recipe.timed_batches,
        points=tuple(point for _, point in tried),
        chosen=point.name,
        references=references,
    )
    return chosen.recipe.model_copy(update={"tune": None}), found


def least_macs(recipe: Recipe, dense: Model, counted: Cost, data: Data) -> float:
    """The share of multiply-accumulates that a recipe's budget leaves, tokens unmerged."""
    step = recipe.step("mp-budget")
    if step is not None and step.params.get("macs") is not None:
        return float(step.params["macs"])
    passes = [one for one in plan_of(recipe).passes if one.name == "mp-budget"]
    planned, _ = PassManager(passes).run(dense, data)
    chosen = {name: layer.pattern for name, layer in planned.plan.items() if layer.pattern is not None}
    return counted.executed_macs(chosen) / counted.macs


def deciding(passes: Sequence[Pass]) -> tuple[Pass, ...]:
    """The passes up to the last that changes the model: what only analyses the result is left out."""
    last = max((place for place, step in enumerate(passes) if step.effect is not Effect.ANALYSIS), default=-1)
    return tuple(passes[: last + 1])


def hits(engine: Engine, images: Split) -> NDArray[np.bool_]:
    """Which of the labelled images an engine gets right."""
    found = [engine(pixels.numpy()).argmax(1) == labels.numpy() for pixels, labels in images.batches()]
    return np.concatenate(found)
