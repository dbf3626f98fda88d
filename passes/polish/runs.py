"""Trainings from the same start, each on a copy of the model."""

import copy
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, fx

from mpcompile.data.images import MODES, Split
from mpcompile.ir.model import Model
from mpcompile.ir.results import Closeness
from mpcompile.ir.source import Source
from mpcompile.passes.distill.augmentation import Augmentation, Pictures
from mpcompile.passes.distill.loss import ElasticNet
from mpcompile.passes.distill.trainer import NotFiniteError, Objective, Schedule, Training, Watch
from mpcompile.passes.polish.closeness import Judge
from mpcompile.pipeline.partial_results import PartialResults

SMALLER, MULTIPLE, SMALLEST = 5 / 7, 32, 96  # 160 of 224 pixels; sizes are multiples of 32, and 96 at least
WARMUP = 10  # steps
MINUTES_BETWEEN = 1.0  # checkpoints
INFINITE = Closeness(float("inf"), None, None)


@runtime_checkable
class PolishSettings(Protocol):
    """The options of the pass that a training takes."""

    @property
    def batch(self) -> int: ...
    @property
    def scale(self) -> float: ...
    @property
    def flip(self) -> float: ...
    @property
    def seed(self) -> int: ...
    @property
    def workers(self) -> int: ...


@dataclass
class StepTimes:
    """A Watch that measures the time of a step."""

    ends: list[float] = field(default_factory=list)
    ended: bool = False

    def after_step(self, step: int, graph: fx.GraphModule) -> None:
        """Notes the time."""
        self.ends.append(time.perf_counter())

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def restore(self, kept: Mapping[str, Tensor]) -> None:
        """Takes nothing."""

    @property
    def median_seconds(self) -> float:
        """The median time of a step, without the first."""
        return statistics.median(end - begin for begin, end in zip(self.ends, self.ends[1:], strict=False))


@dataclass(frozen=True)
class TrainingRuns:
    """Trainings of copies of `model` on the same images.

    Attributes:
        model: where each training starts; it is not changed.
        judge: compares a graph with the dense model.
        images: what is trained on.
        source: preprocessing and size of the images in training.
        settings: options of the pass.
    """

    model: Model
    judge: Judge
    images: Split
    source: Source
    settings: PolishSettings

    def train(self, rate: float, steps: int, watch: Watch | None, finished: PartialResults | None) -> bool:
        """Trains a copy for some steps with this learning rate. Returns whether the loss stayed finite."""
        return self._trained(rate, steps, watch, finished) is not None

    def tried(self, rate: float, steps: int) -> Closeness:
        """The closeness to the dense model after some steps; an infinite divergence if the loss was not finite."""
        graph = self._trained(rate, steps, None, None)
        if graph is None:
            return INFINITE
        return self.judge.of(graph)

    def _trained(
        self, rate: float, steps: int, watch: Watch | None, finished: PartialResults | None
    ) -> fx.GraphModule | None:
        """A trained copy; None if the loss was not finite."""
        options, model = self.settings, self.model
        assert model.dense is not None
        graph = copy.deepcopy(model.graph)
        schedule = Schedule(
            epochs=1,
            batch=options.batch,
            accumulate=1,
            rate=rate,
            weight_decay=0.0,
            warmup=WARMUP,
            optimizer="adamw",
            clip=None,
            precision="fp32",
            soft=0.0,
            seed=options.seed,
            workers=options.workers,
            minutes=MINUTES_BETWEEN,
            steps=steps,
            relative=True,
        )
        objective = Objective(1.0, 1.0, 0.0, ElasticNet(), self.judge.head)
        training = Training(graph, model.dense, model.masks(), schedule, objective, self.images.device)
        augmentation = Augmentation(options.scale, options.flip, None, 0.0)
        try:
            training.run(replace(self.images, labelled=False), self.source, augmentation, finished, watch)
        except NotFiniteError:
            model.dense.requires_grad_(True)
            return None
        return graph


@torch.no_grad()
def training_source(model: Model, images: Split) -> Source:
    """The source with a smaller size of images, if they can be had in another size and the model takes it.

    A training step on 160 of 224 pixels takes half the time. Models whose outputs have another shape then, such as
    maps, are trained at full size.
    """
    source, (channels, height, width) = model.source, model.source.size
    known = isinstance(images.images, Pictures) and channels in MODES
    small = [int(side * SMALLER) // MULTIPLE * MULTIPLE for side in (height, width)]
    if not known or min(small) < SMALLEST or model.others:
        return source
    example = torch.zeros(2, channels, *small, dtype=model.example.dtype)
    smaller = replace(source, size=(channels, small[0], small[1]))
    try:
        assert model.dense is not None
        outputs = [model(example), replace(model, graph=model.dense)(example)]
    except (RuntimeError, ValueError, TypeError, IndexError):  # the model has a fixed size
        return source
    wanted = model(model.example_inputs).shape[1:]
    return smaller if all(one.shape == (2, *wanted) and bool(one.isfinite().all()) for one in outputs) else source
