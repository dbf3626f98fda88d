"""Selections: nodes that take a fixed range along one axis of a tensor, such as `x[:, 0]`, and queries of a shape."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from mpcompile.analysis.attention import shape_of
from mpcompile.passes.unread_tokens.axis_read import Read
from mpcompile.passes.unread_tokens.operator_rules import name_of

EVERYTHING = slice(None)
TYPE_QUERIES = ("dtype", "device", "ndim")


@dataclass(frozen=True, slots=True)
class Selection:
    """An index of a tensor by constants.

    Attributes:
        source: the node of the tensor.
        index: an int, a slice, or None (a new axis), as Python's indexing takes them.
        position: for each axis of the source, its position in `index`.
        out_axis: for each axis of the source, its axis in the result; None if an int removes it.
        sizes: of the axes of the source.
    """

    source: fx.Node
    index: tuple[int | slice | None, ...]
    position: tuple[int, ...]
    out_axis: tuple[int | None, ...]
    sizes: tuple[int, ...]

    def extent(self, axis: int) -> Read:
        """The positions that the index takes along an axis of the source."""
        entry, size = self.index[self.position[axis]], self.sizes[axis]
        if isinstance(entry, int):
            return Read(axis, entry % size, entry % size + 1)
        assert isinstance(entry, slice)
        taken = range(size)[entry]
        return Read(axis, taken[0], taken[-1] + 1) if taken else Read(axis, 0, size)

    def source_read(self, read: Read | None) -> Read | None:
        """The Read of the source, if this is the Read of the result."""
        if read is not None:
            axis = self.out_axis.index(read.axis) if read.axis in self.out_axis else None
            if axis is not None:
                return self._within(axis, read)
        # Axis 0 is the batch, whose size is free.
        extents = [self.extent(axis) for axis in range(1, len(self.sizes))]
        return next((extent for extent in extents if extent.count < self.sizes[extent.axis]), None)

    def _within(self, axis: int, read: Read) -> Read:
        """The positions along an axis of the source that the positions `read` of the result come from."""
        entry = self.index[self.position[axis]]
        assert isinstance(entry, slice)
        taken = range(self.sizes[axis])[entry]
        return Read(axis, taken[read.start], taken[read.stop - 1] + 1)

    def relative(self, read: Read | None, provided: Read | None) -> tuple[int | slice | None, ...]:
        """The index that takes the Read of the result from a source that has only the positions `provided`."""
        index = list(self.index)
        if read is not None and read.axis in self.out_axis:
            axis = self.out_axis.index(read.axis)
            entry, part = index[self.position[axis]], self._within(axis, read)
            assert isinstance(entry, slice)
            index[self.position[axis]] = slice(part.start, part.stop, entry.step)
        if provided is not None:
            entry, first = index[self.position[provided.axis]], provided.start
            size = self.sizes[provided.axis]
            if isinstance(entry, int):
                moved: int | slice = entry % size - first
            else:
                assert isinstance(entry, slice)
                start, stop, step = entry.indices(size)
                moved = slice(start - first, stop - first, None if step == 1 else step)
            index[self.position[provided.axis]] = moved
        return tuple(index)


def selection_of(node: fx.Node) -> Selection | None:
    """The Selection of a getitem, select or narrow of a tensor by constants; None for any other node."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source, *rest = node.args
    sizes = shape_of(source)
    if not sizes or node.kwargs or not shape_of(node):
        return None
    index = _index(name_of(node), rest, sizes)
    if index is None:
        return None
    position, out_axis, at = [], [], 0
    for place, entry in enumerate(index):
        if entry is not None:
            position.append(place)
            out_axis.append(None if isinstance(entry, int) else at)
        at += not isinstance(entry, int)
    return Selection(source, index, tuple(position), tuple(out_axis), sizes)  # type: ignore[arg-type]


def _index(name: str, arguments: Sequence[object], sizes: Sequence[int]) -> tuple[int | slice | None, ...] | None:
    """The index as one entry for each axis and each new axis; None if it is not made of constants."""
    rank = len(sizes)
    if name == "getitem":
        [given] = arguments
        entries = list(given) if isinstance(given, tuple) else [given]
        missing = rank - sum(entry is not None and entry is not Ellipsis for entry in entries)
        whole = [EVERYTHING] * missing
        at = next((i for i, entry in enumerate(entries) if entry is Ellipsis), len(entries))
        entries = [*entries[:at], *whole, *entries[at + 1 :]]
    elif name in ("select", "narrow") and all(isinstance(value, int) for value in arguments):
        dim, start, *length = (int(str(value)) for value in arguments)
        start %= sizes[dim]
        taken = slice(start, start + length[0]) if length else start
        entries = [taken if axis == dim % rank else EVERYTHING for axis in range(rank)]
    else:
        return None
    constants: list[Any] = [_constant(entry) for entry in entries]
    return tuple(constants) if all(map(_is_constant, constants)) else None


def _constant(entry: object) -> object:
    """The entry with each traced size, such as `x.shape[1]`, replaced by its value. The batch size stays."""
    if isinstance(entry, slice):
        return slice(*map(_constant, (entry.start, entry.stop, entry.step)))
    if not isinstance(entry, fx.Node):
        return entry
    query = entry.args[0] if entry.target is operator.getitem else entry  # x.shape[1], or x.size(1)
    asked = sizes_asked(query) if isinstance(query, fx.Node) else None
    at = dict(asked or ()).get(entry)
    return shape_of(query.args[0])[at] if at and isinstance(query, fx.Node) else entry


def _is_constant(entry: object) -> bool:
    """Whether an entry of an index is an int, None, or a slice by ints with a positive step."""
    if isinstance(entry, slice):
        parts = (entry.start, entry.stop, entry.step)
        return all(part is None or isinstance(part, int) for part in parts)
    return entry is None or (isinstance(entry, int) and not isinstance(entry, bool))


def sizes_asked(node: fx.Node) -> list[tuple[fx.Node, int]] | None:
    """The nodes that fetch one size of a tensor through this query of its shape, each with the axis.

    None if the node is no such query, or if a node uses the shape in another way.
    """
    name = name_of(node)
    source = node.args[0] if node.args else None
    rank = len(shape_of(source))
    if not rank:
        return None
    if name == "dim" or (name == "getattr" and node.args[1] in TYPE_QUERIES):
        return []
    if name == "size" and len(node.args) == 2 and isinstance(node.args[1], int):
        return [(node, node.args[1] % rank)]
    if (name == "getattr" and node.args[1] == "shape") or (name == "size" and len(node.args) == 1 and not node.kwargs):
        fetched = [(user, user.args[1]) for user in node.users if user.target is operator.getitem]
        asked = [(user, axis % rank) for user, axis in fetched if isinstance(axis, int)]
        if len(asked) == len(node.users):
            return asked
    return None
