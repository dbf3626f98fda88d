"""Polish: trains the masked model on the dense model's outputs for given minutes; never worse than its start.

The training loop is that of `distill` (passes/distill/trainer.py): no labels, masks applied after every step,
batch-norm statistics fixed. The loss is KL(dense ‖ compressed). A common factor on the logits in the loss was
measured and is worse: the factor of other images is too large for images that the weights were fitted to.

1. The start is compared with the dense model on the validation images. If it loses nothing, nothing is trained.
2. The time of a step and of a comparison gives the number of steps that the minutes allow (budget.py).
3. A fifth of the steps tries learning rates, each from the start. The largest rate whose divergence is within 2 % of
   the least is taken.
4. The training is compared on validation images again and again. The best weights are kept, and it ends if the
   divergence does not fall any more (keep_best.py).

The number of steps, each tried rate and the state of the training are saved in the run's work folder. So on a CPU a
killed and resumed run ends in the same weights. Two runs can differ in their number of steps; `steps` fixes it.
"""

import logging
import math
import time
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from mpcompile.data.images import Data, Split
from mpcompile.errors import PassError, UsageError
from mpcompile.ir.head import head_for
from mpcompile.ir.model import Model
from mpcompile.ir.quantization import quantizers
from mpcompile.ir.results import Closeness, Polished, RateTrial
from mpcompile.passes.dense_comparison import outputs_of
from mpcompile.passes.distill.training_key import training_key
from mpcompile.passes.polish.budget import FEWEST, StepPlan, affordable_steps, step_plan
from mpcompile.passes.polish.closeness import Judge
from mpcompile.passes.polish.keep_best import KeepBest, as_closeness, as_tensor
from mpcompile.passes.polish.runs import StepTimes, TrainingRuns, training_source
from mpcompile.pipeline.partial_results import PartialResults
from mpcompile.pipeline.pass_record import Effect
from mpcompile.system.distributed import process_rank
from mpcompile.system.hashing import sha256

log = logging.getLogger(__name__)
RATES = (5e-5, 1.5e-4, 5e-4)  # relative to the size of a weight
FEWEST_IMAGES = 16  # for validation: with fewer, the best of several checks is chance
LONGEST = 1440.0  # minutes: one day
NOTHING_LOST = 1e-3  # nats; below it nobody reads the difference. A hundredth of what 2:4 costs a compact network
SAME_VALUES = 1e-4  # relative squared error of outputs that are values: 1 % of their spread
TRIAL_IMAGES = 64  # of the validation images, on which learning rates are compared
ABOUT_LEAST = 1.02  # times the least divergence of a trial
TIMED_STEPS = 4  # the first is not counted
KEPT = "the model is left as it was"  # begins the note if nothing is trained


@dataclass(frozen=True, slots=True)
class Polish:
    """Trains the compressed model without labels against the dense model for some minutes; masks stay exact.

    Args:
        minutes: limit of the training, with the comparisons on validation images.
        steps: number of steps in place of the limit, as the report of an earlier run gives it, for the same weights.
        batch: images per step.
        rate: learning rate, relative to the size of a weight; None tries some.
        scale: the smallest share of an image's area that a random crop keeps.
        flip: probability of a horizontal flip.
        seed: seed of image order and augmentation.
        workers: processes that load images.
    """

    name: ClassVar[str] = "polish"
    effect: ClassVar[Effect] = Effect.LOSSY
    requires: ClassVar[tuple[str, ...]] = ()

    minutes: float = 3.0
    steps: int | None = None
    batch: int = 16
    rate: float | None = None
    scale: float = 0.5
    flip: float = 0.5
    seed: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        """Raises UsageError if a value is out of range."""
        if not 0 < self.minutes <= LONGEST:
            raise UsageError(
                f"polish: minutes is {self.minutes:g}; it must be above 0 and at most {LONGEST:g}. Give for example 3"
            )
        if self.steps is not None and self.steps < FEWEST:
            raise UsageError(f"polish: steps is {self.steps}; give {FEWEST} or more, or leave it out")
        if self.batch < 1:
            raise UsageError(f"polish: batch is {self.batch}; give 1 or more images")
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise UsageError(f"polish: rate is {self.rate:g}; give a number above 0, or leave it out")
        for field in ("scale", "flip"):
            if not 0 <= getattr(self, field) <= 1:
                raise UsageError(f"polish: {field} is {getattr(self, field):g}; it must be between 0 and 1")
        if min(self.seed, self.workers) < 0:
            raise UsageError(f"polish: seed is {self.seed} and workers {self.workers}; give numbers of 0 or more")

    def require_inputs(self, model: Model, data: Data) -> None:
        """Raises PassError if images are missing, UsageError under torchrun."""
        images = data.for_training()
        if not len(images):
            raise PassError("polish trains on images; give --data")
        if len(images) < self.batch:
            raise PassError(
                f"{len(images)} training images do not fill a batch of {self.batch}; give more, or a smaller batch"
            )
        if len(data.validation) < FEWEST_IMAGES:
            raise PassError(
                f"there are {len(data.validation)} validation images, on which the training is judged, and "
                f"{FEWEST_IMAGES} are needed; give more images with --data, or fewer for calibration (--calibration)"
            )
        if process_rank().size > 1:
            raise UsageError("polish runs in one process; start it without torchrun, or use --distill")

    def __call__(self, model: Model, data: Data) -> Model:
        """The trained model, or the model as it was; with the record `polished` and a note.

        Raises PassError if images are missing, if the outputs are not finite, or if the model is quantised.
        """
        self.require_inputs(model, data)
        if quantizers(model.graph):
            raise PassError("the model is already quantised; put polish before quantize")
        if model.dense is None:
            return replace(model, notes=(*model.notes, f"{KEPT}: no pass before it changes what the model computes"))
        polished, weights = self._polished(model, data)
        if weights is not None:
            model.graph.load_state_dict(weights)
        note = _told(polished)
        log.info("%s", note)
        return replace(model, polished=polished, notes=(*model.notes, note))

    def _polished(self, model: Model, data: Data) -> tuple[Polished, dict[str, Tensor] | None]:
        """What the training did, and the weights to use; None if the model stays as it was."""
        assert model.dense is not None
        started = time.monotonic()
        images, source = data.for_training(), training_source(model, data.for_training())
        judge = _judge(model, data.validation)
        begun = time.monotonic()
        start = judge.of(model.graph.eval())
        check_seconds = time.monotonic() - begun
        record = Polished(
            self.minutes, 0, 0, self.batch, source.size, None, (), len(images), len(data.validation), start, start, None
        )
        if not math.isfinite(start.divergence):
            raise PassError("the outputs on validation images are not finite; leave polish out, or check the images")
        if start.divergence < (NOTHING_LOST if judge.head.decides else SAME_VALUES):
            return replace(record, kept_start="it loses nothing that a training could give back"), None
        runs = TrainingRuns(model, judge.on_first(TRIAL_IMAGES), images, source, self)
        finished = PartialResults(lambda: self._key(model, data))
        rates = RATES if self.rate is None else (self.rate,)
        steps = self._steps(runs, finished, started, check_seconds, len(data.validation), len(rates))
        if steps < FEWEST:
            why = f"{self.minutes:g} minutes allow {steps} steps of {self.batch} images, and {FEWEST} are needed"
            return replace(record, kept_start=f"{why}; give more minutes"), None
        plan = step_plan(steps, len(rates))
        trials = tuple(_trial(runs, finished, rate, plan) for rate in rates) if plan.probe else ()
        rate = best_rate(trials) if trials else rates[len(rates) // 2]
        record = replace(record, steps=steps, trials=trials)
        if rate is None:
            return replace(record, kept_start="the loss was not finite at any learning rate"), None
        best = KeepBest(judge.of, start, plan)
        finite = runs.train(rate, plan.training, best, finished)
        record = replace(record, rate=rate, taken=best.taken, after=best.best)
        if best.weights is None:
            why = "no check on validation images was better in divergence and not worse in agreement"
            return replace(record, kept_start=why if finite else "the loss was not finite"), None
        return record, best.weights

    def _steps(
        self,
        runs: TrainingRuns,
        finished: PartialResults,
        started: float,
        check_seconds: float,
        images: int,
        rates: int,
    ) -> int:
        """The number of steps: given, decided by a run that was stopped, or what the minutes allow by a measurement."""
        if self.steps is not None:
            return self.steps
        if kept := finished.get("steps"):
            return int(kept["steps"])
        times = StepTimes()
        runs.train(RATES[0], TIMED_STEPS, times, None)
        left = 60 * self.minutes - (time.monotonic() - started)
        trial_seconds = check_seconds * min(1.0, len(runs.judge.images) / images)
        steps = affordable_steps(left, times.median_seconds, check_seconds, trial_seconds, rates)
        log.info(
            "a step takes %.2f s and a check %.2f s; %.0f s allow %d steps",
            times.median_seconds,
            check_seconds,
            left,
            steps,
        )
        finished.put("steps", {"steps": torch.tensor(steps)})
        return steps

    def _key(self, model: Model, data: Data) -> str:
        """A key that identifies this training: options, model, dense model, masks, training and validation images."""
        key = training_key(repr(replace(self, workers=0)), model, data.for_training())
        return sha256(key, *data.validation.hashes())[:32]


def _judge(model: Model, images: Split) -> Judge:
    """Compares graphs with the dense model on these images."""
    assert model.dense is not None
    with torch.no_grad():
        dense = outputs_of(model.dense.eval(), images)
    return Judge(images, dense, head_for(model.head, dense))


def _trial(runs: TrainingRuns, finished: PartialResults, rate: float, plan: StepPlan) -> RateTrial:
    """Trains from the start with a learning rate for some steps, or takes the result of a run that was stopped."""
    part = f"rate-{rate:g}"
    if kept := finished.get(part):
        after = as_closeness(kept["after"])
    else:
        after = runs.tried(rate, plan.probe)
        finished.put(part, {"after": as_tensor(after)})
    log.info("rate %g: divergence %.4g after %d steps", rate, after.divergence, plan.probe)
    return RateTrial(rate, plan.probe, after if math.isfinite(after.divergence) else None)


def best_rate(trials: tuple[RateTrial, ...]) -> float | None:
    """The largest rate whose divergence is about the least; None if no trial is finite.

    A short trial disadvantages large rates: their noise is averaged out only in a longer training.
    """
    finite = [(trial.after.divergence, trial.rate) for trial in trials if trial.after is not None]
    if not finite:
        return None
    least = min(divergence for divergence, _ in finite)
    return max(rate for divergence, rate in finite if divergence <= ABOUT_LEAST * least)


def _told(polished: Polished) -> str:
    """The note of the pass: what was trained and what it changed, or why the model is as it was."""
    where = f"on {polished.validation:,} validation images"
    if polished.kept_start is not None:
        return f"{KEPT}: {polished.kept_start} ({measured(polished.before)} {where})"
    return (
        f"{polished.taken} steps of {polished.batch} images after {sum(t.steps for t in polished.trials)} steps that "
        f"tried learning rates, at {polished.rate:g} of a weight's size: {measured(polished.before)} before, "
        f"{measured(polished.after)} after, {where}"
    )


def measured(closeness: Closeness) -> str:
    """The numbers of a comparison with the dense model."""
    if closeness.agreement is None:
        return f"relative squared error {closeness.divergence:.3g}"
    return f"divergence {closeness.divergence:.3g} nats at the best factor, agreement {closeness.agreement:.2%}"
