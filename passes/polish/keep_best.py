"""Keeps the best weights of a training by checks on validation images, and ends it if it does not improve any more."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from mpcompile.ir.results import Closeness
from mpcompile.passes.polish.budget import StepPlan

log = logging.getLogger(__name__)
FEWEST_WAITED = 4  # checks in a row without a lower divergence that end a training, and at least half of its checks:
# in the first half the learning rate is high, and the divergence can be higher than at the start


@dataclass
class KeepBest:
    """A Watch (passes/distill/trainer.py) that checks the graph as often as the plan says, and after the last step.

    A check is kept as the best if its divergence is the lowest so far and its agreement not below that of the start. So
    the result is in neither measure worse than the start.
    """

    judge: Callable[[fx.GraphModule], Closeness]
    start: Closeness
    plan: StepPlan
    weights: dict[str, Tensor] | None = field(default=None, init=False)  # of the best check; None for the start
    best: Closeness = field(init=False)
    lowest: float = field(init=False)  # divergence of any check
    waited: int = field(default=0, init=False)  # checks since then
    taken: int = field(default=0, init=False)  # steps

    def __post_init__(self) -> None:
        self.best, self.lowest = self.start, self.start.divergence

    @property
    def ended(self) -> bool:
        """Whether the divergence has not fallen for too many checks."""
        return self.waited >= max(FEWEST_WAITED, self.plan.checks // 2)

    def after_step(self, step: int, graph: fx.GraphModule) -> None:
        """Checks the graph if its turn has come."""
        self.taken = step
        if step % self.plan.interval and step != self.plan.training:
            return
        found = self.judge(graph)
        log.info("step %d: divergence %.4g, agreement %s", step, found.divergence, found.agreement)
        self.waited = 0 if found.divergence < self.lowest else self.waited + 1
        self.lowest = min(self.lowest, found.divergence)
        if found.divergence < self.best.divergence and not below(found.agreement, self.start.agreement):
            self.best = found
            self.weights = {name: value.detach().cpu().clone() for name, value in graph.state_dict().items()}

    def state(self) -> dict[str, Tensor]:
        """Numbers, and the best weights if there are any."""
        values = (self.lowest, self.waited, self.taken, self.best.divergence, self.best.factor, self.best.agreement)
        kept = {f"best.{name}": value for name, value in (self.weights or {}).items()}
        return {"values": _tensor(values), **kept}

    def restore(self, kept: Mapping[str, Tensor]) -> None:
        """Takes the state of a checkpoint."""
        lowest, waited, taken, divergence, factor, agreement = _numbers(kept["values"])
        assert lowest is not None
        assert divergence is not None
        self.lowest, self.waited, self.taken = lowest, int(waited or 0), int(taken or 0)
        self.best = Closeness(divergence, factor, agreement)
        weights = {name.removeprefix("best."): value for name, value in kept.items() if name.startswith("best.")}
        self.weights = weights or None


def below(agreement: float | None, start: float | None) -> bool:
    """Whether an agreement is below that of the start; False for outputs without decisions."""
    return agreement is not None and start is not None and agreement < start


def as_tensor(closeness: Closeness) -> Tensor:
    """A Closeness as a tensor for a checkpoint."""
    return _tensor((closeness.divergence, closeness.factor, closeness.agreement))


def as_closeness(values: Tensor) -> Closeness:
    """The Closeness that `as_tensor` made a tensor of."""
    divergence, factor, agreement = _numbers(values)
    assert divergence is not None
    return Closeness(divergence, factor, agreement)


def _tensor(values: tuple[Any, ...]) -> Tensor:
    return torch.tensor([math.nan if value is None else float(value) for value in values], dtype=torch.float64)


def _numbers(values: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]
