"""Reorder channels so that N:M keeps more, folded into the weights around them.

Which channels may be exchanged is read off the graph (passes/permute/channel_tracing.py, passes/permute/coupling.py),
the order is searched for by passes/permute/order_search.py. A cell of channels is scored on the row-stack of all layers
that read it, each with the pattern that it is to have; layers that will stay dense have no say. With patterns that
`rows` output channels share, the scores of those rows are added first, as the mask pass will do. Every parameter along
the channels is then reordered in place, so the deployed graph has no node more than it had, and the function is the
same up to the order of its sums.

The order of output channels is free only in so far as it is the order of somebody's input channels, so with row-shared
patterns it is the reader's score that decides; whole heads keep their places, since groups of M lie within a head.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from mpcompile.analysis.activation_stats import input_scales, per_weight, unexplained_scales
from mpcompile.data.images import Data
from mpcompile.errors import PassError, UsageError, first_line
from mpcompile.ir.model import LayerPlan, Model
from mpcompile.ir.pattern import NM
from mpcompile.passes.nm_mask.nm_mask import NMMask
from mpcompile.passes.permute.constraints import Axis
from mpcompile.passes.permute.coupling import Coupling, ExchangeableSet, Group, apply_order, couple
from mpcompile.passes.permute.order_search import OrderFound, kept, search
from mpcompile.pipeline.pass_manager import Effect
from mpcompile.system.progress import tracked

log = logging.getLogger(__name__)

NO_GAIN = "no order was found that keeps more"
SMALLEST_SWEEP = 4e7  # differences: a few hundredths of a second


@dataclass(frozen=True)
class OrderingProblem:
    """A cell to be ordered: the columns of its readers' scores, of whole groups of M alone."""

    cell: ExchangeableSet
    places: "np.ndarray"  # which of the cell's channels; the others lie in groups that are not all its own
    score: Tensor  # (rows, columns)
    pattern: NM

    def work(self, sweeps: int) -> float:
        """The differences that so many sweeps of assignments take; small cells get more, since they cost nothing."""
        rows, columns = self.score.shape
        return sweeps * max(rows * columns * columns / self.pattern.of, SMALLEST_SWEEP)


def scores_by_axis(
    model: Model, patterns: Mapping[str, NM], scales: Mapping[str, Tensor]
) -> dict[Axis, tuple[Tensor, NM]]:
    """For each masked layer's input axis the scores of its weights, (rows, in_), and its pattern.

    Rows are output channels, those that share a pattern added, times kernel taps. A grouped convolution has an axis for
    each group.
    """
    found = {}
    for name, pattern in patterns.items():
        layer = model.layer(name)
        score = layer.weight.detach().abs()
        if name in scales:
            score = score * per_weight(layer, scales[name]).to(score.dtype)
        groups = getattr(layer, "groups", 1)
        per = len(score) // groups
        for group in range(groups):
            part = score[group * per : (group + 1) * per]
            shared = part.reshape(-1, pattern.rows, *part.shape[1:]).sum(1) if per % pattern.rows == 0 else part
            rows = shared.movedim(1, -1).reshape(-1, part.shape[1])
            axis = Axis(f"{name}.weight", 1, None if groups == 1 else (group * per, (group + 1) * per))
            found[axis] = (rows, pattern)
    return found


def kept_by(scores: Mapping[Axis, tuple[Tensor, NM]]) -> float:
    """What all these axes keep together in the order that they are in."""
    return sum(kept(rows, pattern) for rows, pattern in scores.values())


def job_of(cell: ExchangeableSet, scores: Mapping[Axis, tuple[Tensor, NM]]) -> OrderingProblem | None:
    """The cell's search, or None where no masked layer reads two whole groups of it.

    Readers whose M or whose places differ from those of the reader with most weights are moved along and not scored.
    """
    readers = [axis for axis in cell.slots if axis in scores]
    if not readers:
        return None
    leader = max(readers, key=lambda axis: scores[axis][0].numel())
    pattern = scores[leader][1]
    slots = cell.slots[leader]
    whole = np.bincount(slots // pattern.of, minlength=1)[slots // pattern.of] == pattern.of
    places = np.flatnonzero(whole)[np.argsort(slots[whole], kind="stable")]
    if len(places) < 2 * pattern.of:
        return None
    stack = []
    for axis in readers:
        rows, own = scores[axis]
        at = cell.slots[axis][places]
        together = at.reshape(-1, pattern.of) // pattern.of
        if (own.keep, own.of) == (pattern.keep, pattern.of) and (together == together[:, :1]).all():
            stack.append(rows[:, torch.from_numpy(at)])
    return OrderingProblem(cell, places, torch.cat(stack), pattern)


@dataclass(frozen=True, slots=True)
class Permute:
    """Reorders channels so that the planned patterns, or `pattern` where none are, keep more of the weights.

    `score` is magnitude, |W|; activation, |W| times the size of its input channel on calibration images; or refit, |W|
    times what of that channel the layer's other channels do not tell, which is what removing a weight costs once the
    others are refitted (activations.py). With calibration images it is refit unless it is set. `sweeps` bounds
    the search: the work of so many sweeps of assignments over every channel, so the result does not depend on the
    machine. `strict` makes an error of every masked layer whose channels cannot be moved, save stems.
    """

    name: ClassVar[str] = "permute"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[str, ...]] = ()

    pattern: NM | None = None
    score: Literal["magnitude", "activation", "refit"] | None = None
    sweeps: int = 4
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    strict: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses what cannot be meant."""
        if self.sweeps < 1:
            raise UsageError(f"sweeps is {self.sweeps}; the search needs one at least")

    @torch.no_grad()
    def __call__(self, model: Model, data: Data) -> Model:
        """The same function with its channels reordered; each layer's order, or why it has none, is in its plan."""
        if any(plan.mask is not None for plan in model.plan.values()):
            raise PassError("some layers are masked already; the order of channels is chosen before the masks")
        choices = NMMask(self.pattern, include=self.include, exclude=self.exclude).choices(model)
        patterns = {name: choice for name, choice in choices.items() if isinstance(choice, NM)}
        scales = self._scales(model, data)
        coupling, failure = self._coupling(model)
        cells = [(group, cell) for group in coupling.groups for cell in group.cells]
        orders: dict[Axis, np.ndarray] = {}
        for _, cell in tracked(cells, _label):
            touched = {axis.owner.removesuffix(".weight") for axis in cell.slots} & patterns.keys()
            own = {name: patterns[name] for name in touched}
            # Of the layers that it touches only those that read it are scored: the others are moved along.
            readers = {axis.owner.removesuffix(".weight") for axis in cell.slots if axis.dim == 1} & patterns.keys()
            job = job_of(cell, scores_by_axis(model, {name: patterns[name] for name in readers}, scales))
            if job is None:
                continue
            found = search(job.score, job.pattern, job.work(self.sweeps), self.seed)
            if found.after > found.before:
                self._move(model, job, found, orders, own, scales)
        return model.with_plan(self._plans(model, patterns, coupling, orders, failure))

    def _scales(self, model: Model, data: Data) -> dict[str, Tensor]:
        """What the weights of each layer's input channels are multiplied by in their scores."""
        images = data.calibration
        score = self.score or ("refit" if len(images) else "magnitude")
        if score == "magnitude":
            return {}
        if not len(images):
            raise PassError(f"the score {score} needs calibration images; give --data, or the score magnitude")
        return input_scales(model, images) if score == "activation" else unexplained_scales(model, images)

    def _coupling(self, model: Model) -> tuple[Coupling, str | None]:
        """The coupling; where following the channels fails, none, and what failed: the model is left as it is."""
        try:
            return couple(model), None
        except Exception as error:
            log.warning("channels keep their order: the graph cannot be followed (%s)", first_line(error))
            return Coupling((), {}), f"the graph cannot be followed: {type(error).__name__}: {first_line(error)}"

    def _move(
        self,
        model: Model,
        job: OrderingProblem,
        found: OrderFound,
        orders: dict[Axis, "np.ndarray"],
        patterns: Mapping[str, NM],
        scales: Mapping[str, Tensor],
    ) -> None:
        """Moves a cell's channels, and remembers for each axis which place now holds which former one.

        With row-shared patterns a new order also changes which rows of the writers share; where that costs more than
        the readers gain, the move is taken back.
        """
        order = np.arange(job.cell.size)
        order[job.places] = job.places[found.order.numpy()]
        shared = any(pattern.rows > 1 for pattern in patterns.values())
        before = kept_by(scores_by_axis(model, patterns, scales)) if shared else 0.0
        apply_order(model, job.cell, order)
        _reorder_scales(model, job.cell, order, scales)
        if shared and kept_by(scores_by_axis(model, patterns, scales)) <= before:
            back = np.argsort(order)
            apply_order(model, job.cell, back)
            _reorder_scales(model, job.cell, back, scales)
            return
        parameters = dict(model.graph.named_parameters())
        for axis, slots in job.cell.slots.items():
            if axis.owner in parameters:
                moved = orders.setdefault(axis, np.arange(parameters[axis.owner].shape[axis.dim]))
                moved[slots] = slots[order]

    def _plans(
        self,
        model: Model,
        patterns: Mapping[str, NM],
        coupling: Coupling,
        orders: Mapping[Axis, "np.ndarray"],
        failure: str | None,
    ) -> dict[str, LayerPlan]:
        """Each masked layer's plan with its order, or the reason for none. Raises PassError where strict."""
        plans = {}
        reasons = {axis.owner: reason for axis, reason in coupling.stays.items()}
        for group in coupling.groups:
            for axis in group.readers:
                reasons.setdefault(axis.owner, "; ".join(group.blocked) or NO_GAIN)
        for name in patterns:
            own = {axis: order for axis, order in orders.items() if axis.owner == f"{name}.weight" and axis.dim == 1}
            reason = failure or reasons.get(f"{name}.weight", "its inputs are not followed through the graph")
            if self.strict and not own and reason != NO_GAIN:
                raise PassError(f"the input channels of {name} cannot be moved: {reason}; leave --strict out to go on")
            # A grouped convolution has an order for each group; one tensor holds them one after another.
            whole = [order for _, order in sorted(own.items(), key=lambda pair: pair[0].rows or (0, 0))]
            permutation = torch.from_numpy(np.concatenate(whole)) if whole else None
            plans[name] = replace(model.plan_of(name), permutation=permutation, unpermuted=None if whole else reason)
        return plans


def _reorder_scales(model: Model, cell: ExchangeableSet, order: "np.ndarray", scales: Mapping[str, Tensor]) -> None:
    """Moves the scales of inputs with the inputs, in place."""
    for axis, slots in cell.slots.items():
        name = axis.owner.removesuffix(".weight")
        if axis.dim == 1 and name in scales:
            layer = model.layer(name)
            group = 0 if axis.rows is None else axis.rows[0] // (axis.rows[1] - axis.rows[0])
            first = group * layer.weight.shape[1]
            scales[name][torch.from_numpy(first + slots)] = scales[name][torch.from_numpy(first + slots[order])]


def _label(pair: tuple[Group, ExchangeableSet]) -> str:
    return pair[0].readers[0].owner.removesuffix(".weight")
