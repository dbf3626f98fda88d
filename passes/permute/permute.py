"""Permute: reorders channels so that an N:M pattern keeps more of the weights, at no cost at run time.

The exchangeable channels come from the graph (passes/permute/channel_tracing.py, passes/permute/coupling.py), the order
from a search (passes/permute/order_search.py) on the scores of all masked layers that read an exchangeable set
(passes/permute/ordering_problem.py). The order is written into the weights: every parameter along the channels is
reordered in place, so the graph gets no additional node, and the model computes the same function up to the order of
floating-point sums.

Output channels are reordered only as the input channels of a later layer, so with row-shared patterns the reader's
score decides. Whole heads keep their positions, since groups of M lie within a head.
"""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from mpcompile.analysis.activation_stats import conditional_scales, input_scales
from mpcompile.analysis.eligibility import eligible_patterns
from mpcompile.data.images import Data
from mpcompile.errors import PassError, UsageError, first_line
from mpcompile.ir.model import LayerPlan, Model
from mpcompile.ir.pattern import NM
from mpcompile.ir.pattern_choice import PatternChoice
from mpcompile.passes.permute.constraints import Axis
from mpcompile.passes.permute.coupling import Coupling, ExchangeableSet, Group, apply_order, couple
from mpcompile.passes.permute.order_search import OrderFound, search
from mpcompile.passes.permute.ordering_problem import ordering_problem, scores_by_axis, total_kept
from mpcompile.pipeline.pass_record import Effect
from mpcompile.system.distributed import shared_map
from mpcompile.system.progress import tracked

log = logging.getLogger(__name__)

NO_GAIN = "the search found no order that keeps more"


@dataclass(frozen=True, slots=True)
class Permute:
    """Reorders channels so that the N:M patterns keep more of the weights.

    Args:
        pattern: the pattern of layers whose plan has none.
        score: the score of a weight. `magnitude`: |W|. `activation`: |W| times the root mean square of its input
            channel on calibration images. `refit`: |W| times the conditional standard deviation of its input channel
            given the layer's other channels (mpcompile/analysis/activation_stats.py), which is the cost of removing
            the weight if the others are refitted. Default: refit with calibration images, otherwise magnitude.
        sweeps: limits the search to the work of this many sweeps of assignments over every channel. This is a limit on
            work, not time, so the result does not depend on the machine.
        include: shell patterns over layer names; as in `nm-mask`.
        exclude: shell patterns over layer names; as in `nm-mask`.
        strict: raises PassError if the input channels of a masked layer cannot be moved.
        seed: the seed of the random restarts of the search.

    Raises UsageError for `sweeps` below 1. Calling it raises PassError if a layer is masked already or if the score
    needs calibration images and there are none.
    """

    name: ClassVar[str] = "permute"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[str, ...]] = ()
    shares_work: ClassVar[bool] = True

    pattern: PatternChoice | None = None
    score: Literal["magnitude", "activation", "refit"] | None = None
    sweeps: int = 4
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    strict: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises UsageError for a number of sweeps below 1."""
        if self.sweeps < 1:
            raise UsageError(f"sweeps is {self.sweeps}; the search needs at least 1")

    def require_inputs(self, model: Model, data: Data) -> None:
        """Raises PassError if the score needs calibration images and there are none."""
        if self.score not in (None, "magnitude") and not len(data.calibration):
            raise PassError(f"the score {self.score} needs calibration images; give --data, or the score magnitude")

    @torch.no_grad()
    def __call__(self, model: Model, data: Data) -> Model:
        """The model with its channels reordered; each masked layer's plan has the order, or the reason for none."""
        if any(plan.mask is not None for plan in model.plan.values()):
            raise PassError("some layers are masked already; channels must be reordered before masking")
        eligible = eligible_patterns(model, self.pattern, self.include, self.exclude)
        patterns = {name: choice for name, choice in eligible.items() if isinstance(choice, NM)}
        scales = self._scales(model, data, patterns)
        coupling, failure = self._coupling(model)
        sets = [(group, channels) for group in coupling.groups for channels in group.sets]
        orders: dict[Axis, np.ndarray] = {}

        def searched(one: tuple[Group, ExchangeableSet]) -> tuple["np.ndarray", OrderFound] | None:
            return self._searched(model, one[1], patterns, scales)

        # If rows share a pattern, reordering one set changes the scores of the next: each search follows the reordering
        # before it. Otherwise the searches do not depend on each other, and the ranks share them.
        shared_rows = any(pattern.rows > 1 for pattern in patterns.values())
        one_by_one = (searched(one) for one in tracked(sets, _label, "groups"))
        found = one_by_one if shared_rows else shared_map(searched, sets, _label, "groups")
        for (_, channels), one in zip(sets, found, strict=True):
            if one is not None and one[1].after > one[1].before:
                self._move(model, channels, *one, orders, patterns, scales)
        return model.with_plan(self._plans(model, patterns, coupling, orders, failure))

    def _scales(self, model: Model, data: Data, names: Collection[str]) -> dict[str, Tensor]:
        """For each of these layers, the factor of each input channel in the scores; empty for the score magnitude."""
        images = data.calibration
        self.require_inputs(model, data)
        score = self.score or ("refit" if len(images) else "magnitude")
        if score == "magnitude":
            return {}
        return input_scales(model, images) if score == "activation" else conditional_scales(model, images, names)

    def _coupling(self, model: Model) -> tuple[Coupling, str | None]:
        """The coupling and None. If tracing fails, an empty coupling and the reason, so that nothing is reordered."""
        try:
            return couple(model), None
        except Exception as error:
            log.warning("channels keep their order: they cannot be traced through the graph (%s)", first_line(error))
            reason = f"channels cannot be traced through the graph: {type(error).__name__}: {first_line(error)}"
            return Coupling((), {}), reason

    def _searched(
        self, model: Model, channels: ExchangeableSet, patterns: Mapping[str, NM], scales: Mapping[str, Tensor]
    ) -> tuple["np.ndarray", OrderFound] | None:
        """The best order of a set: the channels that may move, and the order found for them; None if none may."""
        # Layers that only write these channels are reordered with them, but not scored.
        reading = {name: patterns[name] for name in _layers_with(channels, dim=1) & patterns.keys()}
        problem = ordering_problem(channels, scores_by_axis(model, reading, scales))
        if problem is None:
            return None
        return problem.movable, search(problem.score, problem.pattern, problem.work(self.sweeps), self.seed)

    def _move(
        self,
        model: Model,
        channels: ExchangeableSet,
        movable: "np.ndarray",
        result: OrderFound,
        orders: dict[Axis, "np.ndarray"],
        patterns: Mapping[str, NM],
        scales: Mapping[str, Tensor],
    ) -> None:
        """Reorders the channels of a set, and updates `orders`: for each axis, the former position of each channel.

        With row-shared patterns a new order also changes which rows of the writing layers share a pattern. If they lose
        more than the readers gain, the order is reverted.
        """
        order = np.arange(channels.size)
        order[movable] = movable[result.order.numpy(force=True)]
        patterns = {name: patterns[name] for name in _layers_with(channels) & patterns.keys()}
        shared = any(pattern.rows > 1 for pattern in patterns.values())
        before = total_kept(scores_by_axis(model, patterns, scales)) if shared else 0.0
        apply_order(model, channels, order)
        _reorder_scales(model, channels, order, scales)
        if shared and total_kept(scores_by_axis(model, patterns, scales)) <= before:
            inverse = np.argsort(order)
            apply_order(model, channels, inverse)
            _reorder_scales(model, channels, inverse, scales)
            return
        parameters = dict(model.graph.named_parameters())
        for axis, positions in channels.positions.items():
            if axis.owner in parameters:
                former = orders.setdefault(axis, np.arange(parameters[axis.owner].shape[axis.dim]))
                former[positions] = positions[order]

    def _plans(
        self,
        model: Model,
        patterns: Mapping[str, NM],
        coupling: Coupling,
        orders: Mapping[Axis, "np.ndarray"],
        failure: str | None,
    ) -> dict[str, LayerPlan]:
        """Each masked layer's plan with the order of its input channels, or the reason that it has none.

        Raises PassError for the first layer that cannot be moved, if `strict`.
        """
        plans = {}
        reasons = {axis.owner: reason for axis, reason in coupling.unmoved.items()}
        for group in coupling.groups:
            for axis in group.readers:
                reasons.setdefault(axis.owner, "; ".join(group.fixed_reasons) or NO_GAIN)
        for name in patterns:
            own = {axis: order for axis, order in orders.items() if axis.owner == f"{name}.weight" and axis.dim == 1}
            reason = failure or reasons.get(f"{name}.weight", "channel tracing did not reach its inputs")
            if self.strict and not own and reason != NO_GAIN:
                raise PassError(f"the input channels of {name} cannot be moved: {reason}; leave --strict out to go on")
            # A grouped convolution has one order for each group; they are concatenated.
            by_group = [order for _, order in sorted(own.items(), key=lambda pair: pair[0].rows or (0, 0))]
            permutation = torch.from_numpy(np.concatenate(by_group)) if by_group else None
            unpermuted = None if by_group else reason
            plans[name] = replace(model.plan_of(name), permutation=permutation, unpermuted=unpermuted)
        return plans


def _reorder_scales(model: Model, channels: ExchangeableSet, order: "np.ndarray", scales: Mapping[str, Tensor]) -> None:
    """Reorders the scales of the layers that read these channels, in place."""
    for axis, positions in channels.positions.items():
        name = axis.owner.removesuffix(".weight")
        if axis.dim == 1 and name in scales:
            layer = model.layer(name)
            group = 0 if axis.rows is None else axis.rows[0] // (axis.rows[1] - axis.rows[0])
            first = group * layer.weight.shape[1]
            scales[name][torch.from_numpy(first + positions)] = scales[name][torch.from_numpy(first + positions[order])]


def _layers_with(channels: ExchangeableSet, dim: int | None = None) -> set[str]:
    """The owners of the axes that hold these channels; with `dim`, of the axes of this dimension."""
    return {axis.owner.removesuffix(".weight") for axis in channels.positions if dim in (None, axis.dim)}


def _label(item: tuple[Group, ExchangeableSet]) -> str:
    """The name shown with progress: the first layer that reads the group's channels."""
    return item[0].readers[0].owner.removesuffix(".weight")
