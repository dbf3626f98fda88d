"""Groups of channels that must move together, and which of them may be exchanged.

From what passes/permute/channel_tracing.py learnt: atoms that were made one are one class, and a class has a slot on
every parameter axis on which one of its atoms lies. Exchanging two classes on all these axes at once changes no output
if they lie on the same axes and in the same sets that have to stay together, and nothing fixes them. Classes with that
in common are a Cell. Cells that share an axis are a Group: the values of one attention with a cell for each head, the
residual stream, the hidden layer of one MLP.
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
    """Classes that may be exchanged for each other: for each axis their slots, in one common order of the classes."""

    slots: Mapping[Axis, "np.ndarray"]

    @property
    def size(self) -> int:
        """How many classes there are."""
        return len(next(iter(self.slots.values())))


@dataclass(frozen=True)
class Group:
    """Cells that share an axis; `blocked` are reasons for which some of the classes on these axes stay."""

    cells: tuple[ExchangeableSet, ...]
    axes: tuple[Axis, ...]
    readers: tuple[Axis, ...]  # those that a layer sums over
    blocked: tuple[str, ...]

    def __str__(self) -> str:
        sizes = sorted({cell.size for cell in self.cells})
        what = f"{sum(cell.size for cell in self.cells)} channels"
        if len(self.cells) > 1:
            what += f" in {len(self.cells)} sets of {', '.join(map(str, sizes))}"
        lines = [f"{what} read by {_listed(self.readers)}"]
        writers = [axis for axis in self.axes if axis not in self.readers]
        if writers:
            lines.append(f"  kept in step: {_listed(writers)}")
        lines += [f"  not moved: {reason}" for reason in self.blocked]
        return "\n".join(lines)


@dataclass(frozen=True)
class Coupling:
    """All groups of a model, and for each axis that a layer sums over the reason why its channels stay, if they do."""

    groups: tuple[Group, ...]
    stays: Mapping[Axis, str]


def _listed(axes: Sequence[Axis]) -> str:
    names = dict.fromkeys(axis.owner for axis in axes)
    shown = ", ".join(list(names)[:6])
    return shown + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def couple(model: Model) -> Coupling:
    """The coupling of a model's channels, found by following them through its graph on the example."""
    tracker = ChannelTracer(model.graph)
    with torch.no_grad():
        tracker.run(model.example[:1])
    ledger = tracker.ledger
    classes = _classes(ledger.count, ledger.equal)
    axes = {axis: classes[atoms] for axis, atoms in ledger.axes.items()}
    reasons: dict[int, str] = {}
    for atoms, reason in ledger.fixed:
        for found in np.unique(classes[atoms]).tolist():
            reasons.setdefault(found, reason)
    for axis, found in axes.items():
        values, counts = np.unique(found, return_counts=True)
        for value in values[counts > 1].tolist():
            reasons.setdefault(value, f"it appears more than once along {axis.owner}")
    cells = list(_cells(axes, [np.unique(classes[atoms]) for atoms in ledger.together], reasons))
    groups = tuple(_groups(cells, axes, ledger.inputs, reasons))
    moved = {axis for group in groups for axis in group.readers}
    stays = {}
    for axis in ledger.inputs - moved:
        why = [reasons[value] for value in axes[axis].tolist() if value in reasons]
        stays[axis] = why[0] if why else "no two of its channels may be exchanged"
    return Coupling(groups, stays)


def _classes(count: int, equal: Sequence["np.ndarray"]) -> "np.ndarray":
    """The class of each atom."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    pairs = np.concatenate(equal) if equal else np.empty((0, 2), np.int64)
    graph = coo_matrix((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    found: np.ndarray = connected_components(graph, directed=False)[1]
    return found


def _cells(
    axes: Mapping[Axis, "np.ndarray"], together: Sequence["np.ndarray"], fixed: Mapping[int, str]
) -> Iterator[ExchangeableSet]:
    """Sets of classes, two or more, with the same axes and the same sets, none of them fixed."""
    marks: dict[int, list[int]] = {}
    for index, members in enumerate([*axes.values(), *together]):
        for value in members.tolist():
            if value not in fixed:
                marks.setdefault(value, []).append(index)
    alike: dict[tuple[int, ...], list[int]] = {}
    for value, where in marks.items():
        alike.setdefault(tuple(where), []).append(value)
    names = list(axes)
    for signature, values in alike.items():
        own = [names[index] for index in signature if index < len(names)]
        if len(values) < 2 or not own:
            continue
        first = {value: slot for slot, value in enumerate(axes[own[0]].tolist())}
        ordered = np.array(sorted(values, key=first.__getitem__))
        yield ExchangeableSet({axis: _slots_of(axes[axis], ordered) for axis in own})


def _slots_of(axis: "np.ndarray", values: "np.ndarray") -> "np.ndarray":
    """Where these classes lie on an axis."""
    order = np.argsort(axis, kind="stable")
    found: np.ndarray = order[np.searchsorted(axis, values, sorter=order)]
    return found


def _groups(
    cells: Sequence[ExchangeableSet], axes: Mapping[Axis, "np.ndarray"], inputs: set[Axis], fixed: Mapping[int, str]
) -> Iterator[Group]:
    """Cells joined where one layer sums over both; those that no layer sums over have nothing to gain."""
    of_layer: dict[str, list[int]] = {}
    for index, cell in enumerate(cells):
        for axis in cell.slots:
            if axis in inputs:
                of_layer.setdefault(axis.owner, []).append(index)
    pairs = [np.array([(found[0], other) for other in found]) for found in of_layer.values()]
    joined = _classes(len(cells), pairs)
    for number in dict.fromkeys(joined[index] for found in of_layer.values() for index in found):
        own = [cell for index, cell in enumerate(cells) if joined[index] == number]
        met = tuple(dict.fromkeys(axis for cell in own for axis in cell.slots))
        blocked = dict.fromkeys(fixed[v] for axis in met for v in axes[axis].tolist() if v in fixed)
        yield Group(tuple(own), met, tuple(axis for axis in met if axis in inputs), tuple(blocked))


def apply_order(model: Model, cell: ExchangeableSet, order: "np.ndarray") -> None:
    """Moves the channels of a cell in place: the class at place i becomes the one that was at place order[i]."""
    tensors = {**dict(model.graph.named_parameters()), **dict(model.graph.named_buffers())}
    for axis, slots in cell.slots.items():
        tensor: Tensor = tensors[axis.owner].data
        index = np.arange(tensor.shape[axis.dim])
        index[slots] = slots[order]
        part = tensor if axis.rows is None else tensor[slice(*axis.rows)]
        part.copy_(part.index_select(axis.dim, torch.from_numpy(index)))
