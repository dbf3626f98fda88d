"""Runs a graph of operators on two batch sizes at once, and replaces numbers in it that stand for sizes."""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from mpcompile.frontend.exported.program import Program
from mpcompile.frontend.exported.refusal import ProgramRefused
from mpcompile.frontend.exported.reshape_groups import batch_axis, reshape_groups
from mpcompile.frontend.exported.simplify import base_name

LARGER = 2  # by how much the second batch is larger
CREATIONS = {"zeros": 0, "ones": 0, "full": 0, "new_zeros": 1, "new_ones": 1, "new_full": 1}  # position of the sizes
RESHAPES = frozenset(["view", "reshape", "_unsafe_view"])
SIZE = torch.ops.aten.sym_size.int


@dataclass(frozen=True, slots=True)
class BatchReading:
    """Which constants count as the batch, besides those of reshapes: sizes of `expand` and `repeat`, of new tensors."""

    expanded: bool
    created: bool


def shape_of(value: Any) -> tuple[int, ...] | None:
    """The shape of a tensor; None for another value."""
    return tuple(value.shape) if isinstance(value, Tensor) else None


@dataclass(slots=True)
class SizeRewriter:
    """Runs a graph of operators on one or two batches, and rewrites the sizes in it unless `reading` is None."""

    graph: fx.Graph
    program: Program
    batch: int
    reading: BatchReading | None
    _values: dict[fx.Node, tuple[Any, ...]] = field(default_factory=dict)
    _outer: dict[fx.Node, int] = field(default_factory=dict)  # BatchAxis.outer of values; 1 where none is noted
    _batch_node: fx.Node | None = None

    def run(self, *batches: Sequence[Any] | None) -> tuple[list[Any], ...]:
        """The flat outputs for each batch; None for a batch leaves it out."""
        given = [list(batch) for batch in batches if batch is not None]
        placeholders = iter(range(len(self.program.inputs)))
        readers = {node: len(node.users) for node in self.graph.nodes}
        with torch.no_grad():
            for node in list(self.graph.nodes):
                if node.op == "placeholder":
                    position = next(placeholders)
                    self._values[node] = tuple(values[position] for values in given)
                    self._note_batch(node)
                elif node.op == "get_attr":
                    value = self.program.tensors[str(node.target)]
                    self._values[node] = (value,) * len(given)
                elif node.op == "output":
                    return tuple(list(self._values_of(node.args[0], index)) for index in range(len(given)))
                else:
                    if self.reading is not None:
                        self._rewrite(node)
                    self._values[node] = tuple(self._result(node, index) for index in range(len(given)))
                    noted = [self._outer[earlier] for earlier in node.all_input_nodes if earlier in self._outer]
                    if noted:
                        self._outer.setdefault(node, noted[0])
                node.meta["shape"] = shape_of(self._values[node][0])
                for earlier in set(node.all_input_nodes):
                    if earlier in readers:
                        readers[earlier] -= 1
                        if not readers[earlier]:
                            self._release(earlier)
        raise ProgramRefused("has no outputs")

    def _release(self, node: fx.Node) -> None:
        """Frees a value that is not read again; its shapes stay."""
        self._values[node] = tuple(
            torch.empty(0).expand(0) if isinstance(value, Tensor) else value for value in self._values[node]
        )

    def _result(self, node: fx.Node, index: int) -> Any:
        args, kwargs = self._values_of((node.args, dict(node.kwargs)), index)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _values_of(self, arguments: Any, index: int) -> Any:
        """Arguments with the values of one batch in place of nodes."""
        return fx.node.map_arg(arguments, lambda part: self._values[part][index])

    def _note_batch(self, node: fx.Node) -> None:
        """Remembers the first input whose first axis is the batch."""
        if self._batch_node is None and self.reading is not None and isinstance(self._values[node][0], Tensor):
            self._batch_node = node

    # ---- sizes

    def _rewrite(self, node: fx.Node) -> None:
        """Replaces the sizes among the arguments of one operator."""
        if not isinstance(node.target, torch._ops.OpOverload) or self.reading is None:
            return
        name = base_name(node)
        if name in RESHAPES:
            self._rewrite_reshape(node)
        elif name == "unflatten":
            self._rewrite_unflatten(node)
        elif name in ("expand", "repeat") and self.reading.expanded:
            self._rewrite_expand(node, repeats=name == "repeat")
        elif name in CREATIONS and self.reading.created:
            sizes = list(node.args[CREATIONS[name]])  # type: ignore[arg-type]
            if sizes and sizes[0] == self.batch:
                self._set_sizes(node, CREATIONS[name], [self._times_batch(node, 1), *sizes[1:]])

    def _rewrite_reshape(self, node: fx.Node) -> None:
        """Sizes of view and reshape, group by group of axes that are merged or split."""
        x = node.args[0]
        assert isinstance(x, fx.Node)
        sizes = list(node.args[1])  # type: ignore[arg-type]
        before, other = (shape_of(value) or () for value in self._values[x])
        known = [self._values[size][0] if isinstance(size, fx.Node) else size for size in sizes]
        wanted = _resolved(known, math.prod(before))
        grows = next((axis for axis in range(len(before)) if before[axis] != other[axis]), None)
        found = None if grows is None else batch_axis(before, wanted, grows, self._outer.get(x, 1), self.batch)
        if found is not None:
            holder, (merged, group) = found
            self._outer[node] = holder.outer
            if not any(isinstance(sizes[axis], fx.Node) for axis in (*group, holder.axis)) and sizes[holder.axis] != -1:
                sizes[holder.axis] = self._merged(node, x, merged, wanted[holder.axis], holder.axis + 1 == len(sizes))
                before_batch = [axis for axis in group if axis < holder.axis]
                if len(before_batch) == 1 and -1 not in sizes:  # (tokens · batch, c) -> (tokens, batch, c)
                    sizes[before_batch[0]] = -1
        taken = () if found is None else (*found[1][1], found[0].axis)
        for inputs, outputs in reshape_groups(before, wanted):
            one = len(inputs) == len(outputs) == 1 and before[inputs[0]] == other[inputs[0]]
            last = outputs[0] + 1 == len(sizes)  # channels
            if (
                one
                and not last
                and outputs[0] not in taken
                and type(sizes[outputs[0]]) is int
                and sizes[outputs[0]] > 0
            ):
                sizes[outputs[0]] = self._size(node, x, inputs[0])
        self._set_sizes(node, 1, sizes)

    def _rewrite_unflatten(self, node: fx.Node) -> None:
        """Sizes of unflatten on an axis that grows with the batch."""
        x, axis = node.args[0], node.args[1]
        assert isinstance(x, fx.Node)
        assert isinstance(axis, int)
        before, other = (shape_of(value) or () for value in self._values[x])
        sizes = list(node.args[2])  # type: ignore[arg-type]
        if before[axis] == other[axis] or not all(type(size) is int for size in sizes):
            return
        wanted = _resolved(sizes, before[axis])
        found = batch_axis(before[axis : axis + 1 or None], wanted, 0, self._outer.get(x, 1), self.batch)
        if found is not None:
            self._outer[node] = found[0].outer
            sizes[found[0].axis] = self._times_batch(node, wanted[found[0].axis] // self.batch)
            self._set_sizes(node, 2, sizes)

    def _rewrite_expand(self, node: fx.Node, repeats: bool) -> None:
        """Sizes of expand, or factors of repeat: kept axes, and a first axis that is expanded to the batch."""
        x = node.args[0]
        assert isinstance(x, fx.Node)
        before, other = (shape_of(value) or () for value in self._values[x])
        sizes = list(node.args[1])  # type: ignore[arg-type]
        missing = len(sizes) - len(before)
        for axis, size in enumerate(sizes):
            own = before[axis - missing] if axis >= missing else None
            grows = own is not None and own != other[axis - missing]
            if type(size) is not int or size == -1 or grows:
                sizes[axis] = -1 if grows and not repeats else size
            elif axis == 0 and size == self.batch and own in (None, 1):
                sizes[axis] = self._times_batch(node, 1)
            elif own == size and not repeats:
                sizes[axis] = -1
        self._set_sizes(node, 1, sizes)

    def _set_sizes(self, node: fx.Node, position: int, sizes: list[Any]) -> None:
        node.args = (*node.args[:position], sizes, *node.args[position + 1 :])

    def _size(self, before: fx.Node, x: fx.Node, axis: int) -> fx.Node:
        """A node of the size of an axis."""
        return self._new(before, SIZE, (x, axis), tuple(value.shape[axis] for value in self._values[x]))

    def _merged(self, before: fx.Node, x: fx.Node, axes: list[int], size: int, is_last: bool) -> fx.Node:
        """A node of the size of an axis with the batch: of merged axes of `x` if that is their product."""
        shape = shape_of(self._values[x][0]) or ()
        if is_last or len(axes) == 1 or math.prod(shape[axis] for axis in axes) != size:
            return self._times_batch(before, size // self.batch)
        product = self._size(before, x, axes[0])
        for axis in axes[1:]:
            factors = (product, self._size(before, x, axis))
            values = tuple(one * other for one, other in zip(*(self._values[part] for part in factors), strict=True))
            product = self._new(before, operator.mul, factors, values)
        return product

    def _times_batch(self, before: fx.Node, factor: int) -> fx.Node:
        """A node of the batch size times a constant."""
        assert self._batch_node is not None
        batch = self._new(before, SIZE, (self._batch_node, 0), self._batch_sizes())
        if factor == 1:
            return batch
        return self._new(before, operator.mul, (batch, factor), tuple(size * factor for size in self._batch_sizes()))

    def _batch_sizes(self) -> tuple[int, int]:
        return self.batch, self.batch + LARGER

    def _new(
        self, before: fx.Node, target: Callable[..., Any], args: tuple[Any, ...], values: tuple[Any, ...]
    ) -> fx.Node:
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args)
        self._values[node] = values
        return node


def _resolved(sizes: Sequence[int], total: int) -> list[int]:
    """Sizes with the value that −1 stands for."""
    known = math.prod(size for size in sizes if size != -1)
    return [total // known if size == -1 and known else size for size in sizes]
