"""Makes the batch of an exported program free, and its reshapes independent of the number of tokens.

torch.export writes sizes as numbers: `view(x, [2, 197, 3, 4, 16])`, also those of the batch unless the export was told
that it is dynamic. Here a program is run on two batch sizes at once, operator by operator. At each operator that takes
sizes, a size that its input has too becomes `input.size(axis)`, and one that grows with the batch becomes
`batch * constant`.

Which numbers stand for the batch is not always certain (a leading 1 of an `expand` may be the batch of the example). The
result is therefore compared with the original: its outputs on the other batch must be those that the original
computes for the same images, in batches of the size that it was exported with. If no reading of the numbers passes,
the program is refused.
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from mpcompile.frontend.exported.program import Program
from mpcompile.frontend.exported.refusal import Refused
from mpcompile.frontend.exported.reshape_groups import reshape_groups
from mpcompile.frontend.exported.simplify import base_name
from mpcompile.ir.parity import relative_difference

# Largest relative difference between rows of two batch sizes: kernels sum in another order for another batch.
ROW_DRIFT = 1e-4
CREATIONS = {"zeros": 0, "ones": 0, "full": 0, "new_zeros": 1, "new_ones": 1, "new_full": 1}  # position of the sizes
RESHAPES = frozenset(["view", "reshape", "_unsafe_view"])
SIZE = torch.ops.aten.sym_size.int
EXPORT_AGAIN = (
    "export it again with a free batch: torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim('batch')},))"
)


@dataclass(frozen=True, slots=True)
class Reading:
    """Which constants count as the batch, besides those of reshapes: sizes of `expand` and `repeat`, of new tensors."""

    expanded: bool
    created: bool


READINGS = (Reading(True, False), Reading(True, True), Reading(False, False))


def with_free_batch(program: Program) -> fx.Graph:
    """The program's graph for any batch size; the shapes of its values stand in `meta["shape"]`. Raises Refused."""
    batch = batch_of(program)
    inputs = example_inputs(program, batch)
    others = example_inputs(program, batch + 2)
    expected = run(program.graph, program, inputs)
    reference = _rows(program, others, batch)
    reasons = []
    for reading in READINGS[-1:] if program.inputs[0].free[:1] == (0,) else READINGS:
        graph = fx.Graph()
        graph.output(graph.graph_copy(program.graph, {}))
        try:
            freer = _Freer(graph, program, batch, reading)
            found, found_others = freer.run(inputs, others)
        except Exception as error:  # any operator may fail on sizes that were read wrongly
            reasons.append(str(error).strip().partition("\n")[0] or type(error).__name__)
            continue
        differences = [*map(_difference, found, expected), *map(_difference, found_others, reference)]
        if max(differences, default=0.0) <= ROW_DRIFT:
            return graph
        reasons.append(f"outputs differ by {max(differences):.1e} of their size")
    raise Refused(
        f"was exported for batches of {batch}, and cannot be made free of it ({reasons[0][:300]}); {EXPORT_AGAIN}"
    )


def batch_of(program: Program) -> int:
    """The batch size that the program was exported with. Raises Refused if its inputs have none in common."""
    tensors = [given for given in program.inputs if given.shape is not None]
    if not tensors:
        raise Refused("has no tensor as input")
    sizes = [given.shape[0] if given.shape else 0 for given in tensors]
    if min(sizes) < 1:
        raise Refused(f"has the input {tensors[sizes.index(min(sizes))].name} without a batch axis")
    return sizes[0]


def example_inputs(program: Program, batch: int) -> list[Any]:
    """Random values for the inputs, for a batch of this size. Axes that are the batch of the first input follow it."""
    own = batch_of(program)
    generator = torch.Generator().manual_seed(0)
    values: list[Any] = []
    for given in program.inputs:
        if given.shape is None or given.dtype is None:
            values.append(given.constant)
            continue
        shape = ((batch if given.shape[0] == own else given.shape[0]), *given.shape[1:])
        if given.dtype.is_floating_point:
            values.append(torch.randn(shape, generator=generator).to(given.dtype))
        else:
            values.append(torch.randint(0, 2, shape, generator=generator).to(given.dtype))
    return values


def run(graph: fx.Graph, program: Program, inputs: Sequence[Any]) -> list[Any]:
    """The flat outputs of a graph of operators."""
    return _Freer(graph, program, 0, None).run(inputs, None)[0]


def _rows(program: Program, inputs: Sequence[Any], batch: int) -> list[Any]:
    """The outputs for a larger batch, computed by the original in batches of its own size."""
    total = batch + 2
    starts = [*range(0, total - batch, batch), total - batch]
    kept: dict[int, list[Any]] = {}
    for start in starts:
        part = [
            value[start : start + batch] if isinstance(value, Tensor) and len(value) == total else value
            for value in inputs
        ]
        outputs = run(program.graph, program, part)
        for row in range(batch):
            kept[start + row] = [
                value[row : row + 1] if isinstance(value, Tensor) and value.ndim and len(value) == batch else value
                for value in outputs
            ]
    return [
        torch.cat(parts) if isinstance(parts[0], Tensor) and parts[0].ndim and len(parts[0]) == 1 else parts[0]
        for parts in (list(column) for column in zip(*(kept[row] for row in range(total)), strict=True))
    ]


def _difference(found: Any, wanted: Any) -> float:
    """The relative difference of two outputs; infinite for other shapes."""
    if not isinstance(found, Tensor) or not isinstance(wanted, Tensor):
        return 0.0 if found == wanted else float("inf")
    if found.shape != wanted.shape:
        return float("inf")
    return relative_difference(wanted.double().numpy(force=True), found.double().numpy(force=True))


def shape_of(value: Any) -> tuple[int, ...] | None:
    """The shape of a tensor; None for another value."""
    return tuple(value.shape) if isinstance(value, Tensor) else None


@dataclass(slots=True)
class _Freer:
    """Runs a graph of operators on one or two batches, and rewrites the sizes in it unless `reading` is None."""

    graph: fx.Graph
    program: Program
    batch: int
    reading: Reading | None
    _values: dict[fx.Node, tuple[Any, ...]] = field(default_factory=dict)
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
                    return tuple(
                        list(fx.node.map_arg(node.args[0], lambda part: self._values[part][index]))
                        for index in range(len(given))
                    )
                else:
                    if self.reading is not None:
                        self._rewrite(node)
                    self._values[node] = tuple(self._result(node, index) for index in range(len(given)))
                node.meta["shape"] = shape_of(self._values[node][0])
                for earlier in set(node.all_input_nodes):
                    if earlier in readers:
                        readers[earlier] -= 1
                        if not readers[earlier]:
                            self._release(earlier)
        raise Refused("has no outputs")

    def _release(self, node: fx.Node) -> None:
        """Frees a value that is not read again; its shapes stay."""
        self._values[node] = tuple(
            torch.empty(0).expand(0) if isinstance(value, Tensor) else value for value in self._values[node]
        )

    def _result(self, node: fx.Node, index: int) -> Any:
        values = fx.node.map_arg((node.args, dict(node.kwargs)), lambda part: self._values[part][index])
        return node.target(*values[0], **values[1])  # type: ignore[operator]

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
        for inputs, outputs in reshape_groups(before, wanted):
            grows = [axis for axis in inputs if before[axis] != other[axis]]
            if any(isinstance(sizes[axis], fx.Node) for axis in outputs):
                continue
            target = next((axis for axis in outputs if wanted[axis] % self.batch == 0), outputs[0])
            if sizes[target] == -1:
                continue
            if len(inputs) == len(outputs) == 1 and (grows or target + 1 < len(sizes)):  # the last axis: channels
                sizes[target] = self._size(node, x, inputs[0])
            elif grows:
                sizes[target] = self._times_batch(node, wanted[target] // self.batch)
        self._set_sizes(node, 1, sizes)

    def _rewrite_unflatten(self, node: fx.Node) -> None:
        """Sizes of unflatten on an axis that grows with the batch."""
        x, axis = node.args[0], node.args[1]
        assert isinstance(x, fx.Node) and isinstance(axis, int)
        before, other = (shape_of(value) or () for value in self._values[x])
        sizes = list(node.args[2])  # type: ignore[arg-type]
        if before[axis] != other[axis] and type(sizes[0]) is int and sizes[0] > 0 and sizes[0] % self.batch == 0:
            self._set_sizes(node, 2, [self._times_batch(node, sizes[0] // self.batch), *sizes[1:]])

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

    def _times_batch(self, before: fx.Node, factor: int) -> fx.Node:
        """A node of the batch size times a constant."""
        assert self._batch_node is not None
        batch = self._new(before, SIZE, (self._batch_node, 0), self._batch_sizes())
        if factor == 1:
            return batch
        return self._new(before, operator.mul, (batch, factor), tuple(size * factor for size in self._batch_sizes()))

    def _batch_sizes(self) -> tuple[int, int]:
        return self.batch, self.batch + 2

    def _new(self, before: fx.Node, target: Callable[..., Any], args: tuple[Any, ...], values: tuple[Any, ...]) -> fx.Node:
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args)
        self._values[node] = values
        return node


def _resolved(sizes: Sequence[int], total: int) -> list[int]:
    """Sizes with the value that −1 stands for."""
    known = math.prod(size for size in sizes if size != -1)
    return [total // known if size == -1 and known else size for size in sizes]
