"""Outputs as users have them (a tensor, a dict, a ModelOutput, …) and as a graph has them: flat tensors."""

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of tensor number `index` in a tree of outputs."""

    index: int


ONE = Slot(0)  # the tree of a model that returns one tensor


def flattened(outputs: Any) -> tuple[Any, tuple[tuple[str, Tensor], ...]]:
    """A tree of outputs with a Slot in place of each tensor, and the tensors with their paths, in order.

    A path is made of keys, field names and positions, such as `logits` or `features.0`; it is empty if the output is
    one tensor. Trees are made of tuples, lists, mappings and dataclasses; other values are kept as they are.
    """
    tensors: list[tuple[str, Tensor]] = []

    def visit(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            tensors.append((path, value))
            return Slot(len(tensors) - 1)
        return _mapped(value, lambda part, key: visit(part, f"{path}.{key}" if path else str(key)))

    tree = visit(outputs, "")
    return tree, tuple(tensors)


def rebuilt(tree: Any, tensors: Sequence[Tensor | Slot]) -> Any:
    """The outputs with these tensors in place of the Slots of a tree."""
    if isinstance(tree, Slot):
        return tensors[tree.index]
    return _mapped(tree, lambda part, key: rebuilt(part, tensors))


def other_values(tree: Any) -> Iterator[Any]:
    """The values of a tree that are neither tensors nor None."""
    if isinstance(tree, Slot) or tree is None:
        return
    parts: list[Any] = []
    _mapped(tree, lambda part, key: parts.append(part))
    if not parts and not isinstance(tree, tuple | list | Mapping):
        yield tree
    for part in parts:
        yield from other_values(part)


def _mapped(value: Any, function: Any) -> Any:
    """The container with `function(part, key)` in place of each part; a value that is no container as it is."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(function(part, key) for key, part in zip(value._fields, value, strict=True)))
    if isinstance(value, tuple | list):
        return type(value)(function(part, index) for index, part in enumerate(value))
    if isinstance(value, Mapping):
        parts = {key: function(part, key) for key, part in value.items()}
        # A ModelOutput of transformers is a mapping and a dataclass; its constructor takes the fields by name.
        kind: Any = type(value)
        if isinstance(value, defaultdict):
            return kind(value.default_factory, parts)
        return kind(**parts) if dataclasses.is_dataclass(value) else kind(parts)
    if dataclasses.is_dataclass(value) and not isinstance(value, type | Slot):
        parts = {row.name: function(getattr(value, row.name), row.name) for row in dataclasses.fields(value)}
        changed = copy.copy(value)  # dataclasses.replace would run __post_init__, and refuse fields with init=False
        for name, part in parts.items():
            object.__setattr__(changed, name, part)
        return changed
    return value
