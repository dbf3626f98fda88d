"""Groups of channels that must be reordered together, and which of their channels may be exchanged.

Input: the ChannelConstraints of passes/permute/channel_tracing.py. Ids that were unified are one channel: channels are
the connected components of the graph of equal ids. A channel has one position on each parameter axis that holds one of
its ids. Two channels may be exchanged, on all these axes at once, without changing the model's outputs if

- both lie on the same axes,
- both belong to the same sets of channels that must stay together,
- neither is fixed.

Channels that agree in all this form an ExchangeableSet. Exchangeable sets that share a layer's input form a Group, for
example the values of one attention (a set for each head), the residual stream, or the hidden layer of one MLP.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mpcompile.ir.model import Model
from mpcompile.passes.permute.channel_tracing import ChannelTracer
from mpcompile.passes.permute.constraints import Axis


@dataclass(frozen=True)
class ExchangeableSet:
    """Channels that may be exchanged for each other.

    `positions` holds, for each parameter axis they lie on, the positions of the channels; entry i is the same channel
    on every axis.
    """

    positions: Mapping[Axis, "np.ndarray"]

    @property
    def size(self) -> int:
        """The number of channels."""
        return len(next(iter(self.positions.values())))


@dataclass(frozen=True)
class Group:
    """Exchangeable sets that share axes.

    Attributes:
        sets: the exchangeable sets, at least one.
        axes: all axes that their channels lie on.
        readers: those of `axes` that a layer sums over.
        fixed_reasons: why other channels on these axes must keep their position, each reason once.
    """

    sets: tuple[ExchangeableSet, ...]
    axes: tuple[Axis, ...]
    readers: tuple[Axis, ...]
    fixed_reasons: tuple[str, ...]

    def __str__(self) -> str:
        sizes = sorted({channels.size for channels in self.sets})
        text = f"{sum(channels.size for channels in self.sets)} channels"
        if len(self.sets) > 1:
            text += f" in {len(self.sets)} sets of {', '.join(map(str, sizes))}"
        lines = [f"{text} read by {_listed(self.readers)}"]
        others = [axis for axis in self.axes if axis not in self.readers]
        if others:
            lines.append(f"  reordered with them: {_listed(others)}")
        lines += [f"  not moved: {reason}" for reason in self.fixed_reasons]
        return "\n".join(lines)


@dataclass(frozen=True)
class Coupling:
    """All groups of a model; `unmoved` maps each input axis outside all groups to the reason it is not reordered."""

    groups: tuple[Group, ...]
    unmoved: Mapping[Axis, str]


def _listed(axes: Sequence[Axis]) -> str:
    """The names of the axes' parameters, at most six of them."""
    names = dict.fromkeys(axis.owner for axis in axes)
    shown = ", ".join(list(names)[:6])
    return shown + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def couple(model: Model) -> Coupling:
    """The coupling of a model's channels, found by tracing them through its graph on the first example image."""
    tracer = ChannelTracer(model.graph)
    with torch.no_grad():
        tracer.run(*(one[:1] for one in model.example_inputs))
    constraints = tracer.constraints
    channel_of_id = _components(constraints.count, constraints.equal)
    axes = {axis: channel_of_id[ids] for axis, ids in constraints.axes.items()}
    fixed: dict[int, str] = {}  # channel -> the first reason found
    for ids, reason in constraints.fixed:
        for channel in np.unique(channel_of_id[ids]).tolist():
            fixed.setdefault(channel, reason)
    for axis, channels in axes.items():
        distinct, counts = np.unique(channels, return_counts=True)
        for channel in distinct[counts > 1].tolist():
            fixed.setdefault(channel, f"it appears more than once along {axis.owner}")
    together = [np.unique(channel_of_id[ids]) for ids in constraints.together]
    sets = list(_exchangeable_sets(axes, together, fixed))
    groups = tuple(_groups(sets, axes, constraints.inputs, fixed))
    moved = {axis for group in groups for axis in group.readers}
    unmoved = {}
    for axis in constraints.inputs - moved:
        reasons = [fixed[channel] for channel in axes[axis].tolist() if channel in fixed]
        unmoved[axis] = reasons[0] if reasons else "no two of its channels may be exchanged"
    return Coupling(groups, unmoved)


def _components(count: int, pairs: Sequence["np.ndarray"]) -> "np.ndarray":
    """The connected component of each of `count` nodes, given edges as arrays of shape (n, 2)."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    edges = np.concatenate(pairs) if pairs else np.empty((0, 2), np.int64)
    graph = coo_matrix((np.ones(len(edges), bool), (edges[:, 0], edges[:, 1])), shape=(count, count))
    components: np.ndarray = connected_components(graph, directed=False)[1]
    return components


def _exchangeable_sets(
    axes: Mapping[Axis, "np.ndarray"], together: Sequence["np.ndarray"], fixed: Mapping[int, str]
) -> Iterator[ExchangeableSet]:
    """Sets of two or more channels that lie on the same axes and in the same sets of `together`, none of them fixed."""
    memberships: dict[int, list[int]] = {}  # channel -> indices of the axes and sets that hold it
    for index, members in enumerate([*axes.values(), *together]):
        for channel in members.tolist():
            if channel not in fixed:
                memberships.setdefault(channel, []).append(index)
    by_membership: dict[tuple[int, ...], list[int]] = {}
    for channel, indices in memberships.items():
        by_membership.setdefault(tuple(indices), []).append(channel)
    all_axes = list(axes)
    for indices_of_set, channels in by_membership.items():
        own = [all_axes[index] for index in indices_of_set if index < len(all_axes)]
        if len(channels) < 2 or not own:
            continue
        position = {channel: index for index, channel in enumerate(axes[own[0]].tolist())}
        ordered = np.array(sorted(channels, key=position.__getitem__))
        yield ExchangeableSet({axis: _positions_of(ordered, axes[axis]) for axis in own})


def _positions_of(channels: "np.ndarray", along_axis: "np.ndarray") -> "np.ndarray":
    """The position of each channel on an axis, given the channels along that axis."""
    order = np.argsort(along_axis, kind="stable")
    positions: np.ndarray = order[np.searchsorted(along_axis, channels, sorter=order)]
    return positions


def _groups(
    sets: Sequence[ExchangeableSet], axes: Mapping[Axis, "np.ndarray"], inputs: set[Axis], fixed: Mapping[int, str]
) -> Iterator[Group]:
    """Sets merged into a group where one layer sums over both. Sets that no layer sums over gain nothing: left out."""
    sets_of_layer: dict[str, list[int]] = {}
    for index, channels in enumerate(sets):
        for axis in channels.positions:
            if axis in inputs:
                sets_of_layer.setdefault(axis.owner, []).append(index)
    pairs = [np.array([(indices[0], other) for other in indices]) for indices in sets_of_layer.values()]
    group_of_set = _components(len(sets), pairs)
    for number in dict.fromkeys(group_of_set[index] for indices in sets_of_layer.values() for index in indices):
        own = [channels for index, channels in enumerate(sets) if group_of_set[index] == number]
        own_axes = tuple(dict.fromkeys(axis for channels in own for axis in channels.positions))
        reasons = dict.fromkeys(fixed[c] for axis in own_axes for c in axes[axis].tolist() if c in fixed)
        yield Group(tuple(own), own_axes, tuple(axis for axis in own_axes if axis in inputs), tuple(reasons))


def apply_order(model: Model, channels: ExchangeableSet, order: "np.ndarray") -> None:
    """Reorders the channels in place, on all their axes: channel i becomes what channel order[i] was."""
    tensors = {**dict(model.graph.named_parameters()), **dict(model.graph.named_buffers())}
    for axis, positions in channels.positions.items():
        tensor: Tensor = tensors[axis.owner].data
        index = np.arange(tensor.shape[axis.dim])
        index[positions] = positions[order]
        part = tensor if axis.rows is None else tensor[slice(*axis.rows)]
        part.copy_(part.index_select(axis.dim, torch.from_numpy(index).to(part.device)))
