"""The search for the order of one exchangeable set: the stacked scores of the layers that read it, and what may move.

A score is the size of a weight, or that times the scale of its input channel (passes/permute/permute.py). Layers that
stay dense are not scored. With patterns that `rows` output channels share, the scores of those rows are added first, as
the mask pass does.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mpcompile.analysis.activation_stats import per_weight
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.passes.permute.constraints import Axis
from mpcompile.passes.permute.coupling import ExchangeableSet
from mpcompile.passes.permute.order_search import kept_score

SMALLEST_SWEEP = 4e7  # differences: a few hundredths of a second


@dataclass(frozen=True)
class OrderingProblem:
    """The search for the order of one exchangeable set.

    Attributes:
        channels: the exchangeable set.
        movable: indices into the set of the channels that are searched over, in order of position. Only whole groups of
            M are: a group with channels of other sets is left as it is.
        score: (rows, columns), the stacked scores of all readers; column i belongs to channel movable[i].
        pattern: the N:M pattern.
    """

    channels: ExchangeableSet
    movable: "np.ndarray"
    score: Tensor
    pattern: NM

    def work(self, sweeps: int) -> float:
        """The work of `sweeps` sweeps of assignments, in differences; small sets get SMALLEST_SWEEP a sweep."""
        rows, columns = self.score.shape
        return sweeps * max(rows * columns * columns / self.pattern.of, SMALLEST_SWEEP)


def scores_by_axis(
    model: Model, patterns: Mapping[str, NM], scales: Mapping[str, Tensor]
) -> dict[Axis, tuple[Tensor, NM]]:
    """For each masked layer's input axis, the scores of its weights, (rows, in_), and the layer's pattern.

    A score is |W|, times the scale of the weight's input channel where `scales` has the layer. Rows are output channels
    times kernel taps; the scores of rows that share a pattern are added. A grouped convolution has an axis for each
    group.
    """
    scores = {}
    for name, pattern in patterns.items():
        layer = model.layer(name)
        score = layer.weight.detach().abs()
        if name in scales:
            score = score * per_weight(layer, scales[name]).to(score.dtype)
        groups = getattr(layer, "groups", 1)
        per_group = len(score) // groups
        for group in range(groups):
            part = score[group * per_group : (group + 1) * per_group]
            if per_group % pattern.rows == 0:
                part = part.reshape(-1, pattern.rows, *part.shape[1:]).sum(1)
            rows = part.movedim(1, -1).reshape(-1, part.shape[1])
            axis = Axis(f"{name}.weight", 1, None if groups == 1 else (group * per_group, (group + 1) * per_group))
            scores[axis] = (rows, pattern)
    return scores


def total_kept(scores: Mapping[Axis, tuple[Tensor, NM]]) -> float:
    """The sum over all axes of the score that the pattern keeps in the current order."""
    return sum(kept_score(rows, pattern) for rows, pattern in scores.values())


def ordering_problem(channels: ExchangeableSet, scores: Mapping[Axis, tuple[Tensor, NM]]) -> OrderingProblem | None:
    """The search for an exchangeable set, or None if no masked layer reads two whole groups of M of it.

    The masked layer with the most scores determines the pattern and the groups. Other readers are scored only if they
    have the same N:M and the same groups; otherwise they are reordered, but do not influence the order.
    """
    readers = [axis for axis in channels.positions if axis in scores]
    if not readers:
        return None
    largest = max(readers, key=lambda axis: scores[axis][0].numel())
    pattern = scores[largest][1]
    positions = channels.positions[largest]
    in_whole_group = np.bincount(positions // pattern.of, minlength=1)[positions // pattern.of] == pattern.of
    movable = np.flatnonzero(in_whole_group)[np.argsort(positions[in_whole_group], kind="stable")]
    if len(movable) < 2 * pattern.of:
        return None
    stack = []
    for axis in readers:
        rows, own = scores[axis]
        columns = channels.positions[axis][movable]
        groups = columns.reshape(-1, pattern.of) // pattern.of
        if (own.keep, own.of) == (pattern.keep, pattern.of) and (groups == groups[:, :1]).all():
            stack.append(rows[:, torch.from_numpy(columns)])
    return OrderingProblem(channels, movable, torch.cat(stack), pattern)
