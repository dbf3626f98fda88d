"""Flow: a tensor with planes that tell, for each of its numbers, which channel it belongs to.

A plane is an integer tensor of the tensor's shape. It varies along the axes that channels lie along, and is kept as a
view of what varies, so that it costs little.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only


@dataclass(frozen=True)
class LabelledTensor:
    """A tensor with the planes that tell its channels.

    `parameter` is its name where it is one, just fetched; `lost` says what lost its channels, where something did.
    """

    tensor: Tensor
    planes: tuple[Tensor, ...] = ()
    parameter: str | None = None
    lost: str | None = None


def varying(plane: Tensor) -> frozenset[int]:
    """The axes along which a plane is not constant."""
    found = set()
    for dim, (size, stride) in enumerate(zip(plane.shape, plane.stride(), strict=True)):
        if size > 1 and stride != 0 and not torch.equal(plane, plane.narrow(dim, 0, 1).expand_as(plane)):
            found.add(dim)
    return frozenset(found)


def compressed(plane: Tensor, keep: Sequence[int] = ()) -> Tensor:
    """The plane with size 1 along the axes on which it is constant, save those to keep."""
    dims = varying(plane)
    for dim in range(plane.ndim):
        if dim not in dims and dim not in keep:
            plane = plane.narrow(dim, 0, 1)
    return plane


def columns(plane: Tensor, dim: int) -> "np.ndarray":
    """The atoms along one axis, a row for each place on the others; equal rows once."""
    rows = compressed(plane, [dim % plane.ndim]).movedim(dim, -1)
    found: np.ndarray = np.unique(rows.reshape(-1, rows.shape[-1]).numpy(), axis=0)
    return found


def flows(value: Any) -> list[LabelledTensor]:
    """Every Flow in nested arguments."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, LabelledTensor)]


def plain(value: Any) -> Any:
    """Arguments with tensors for Flows."""
    return tree_map_only(LabelledTensor, lambda flow: flow.tensor, value)


def with_plane(value: Any, flow: LabelledTensor, plane: Tensor) -> Any:
    """Arguments with a plane for one Flow."""
    return tree_map_only(LabelledTensor, lambda other: plane if other is flow else other, value)


def wrapped(result: Any, lost: str | None = None) -> Any:
    """A result with Flows of unknown channels for tensors."""
    return tree_map_only(Tensor, lambda tensor: LabelledTensor(tensor, lost=lost), result)


def paired(result: Any, moved: list[Any]) -> Any:
    """A result, or a tuple of results, with its planes."""
    if isinstance(result, Tensor):
        return LabelledTensor(result, tuple(compressed(plane).expand(result.shape) for plane in moved))
    return tuple(paired(part, [m[index] for m in moved]) for index, part in enumerate(result))


def along(atoms: "np.ndarray", shape: Sequence[int], dim: int) -> Tensor:
    """A plane of that shape with these atoms along one axis."""
    sizes = [1] * len(shape)
    sizes[dim] = len(atoms)
    return torch.from_numpy(atoms).reshape(sizes).expand(tuple(shape))


def reduced(shape: torch.Size, call: Callable[..., Any], args: Any, kwargs: Any) -> tuple[frozenset[int], bool]:
    """The axes that a reduction removes, and whether it leaves them with size 1: told by its result's shape."""
    probe = torch.zeros(tuple(range(2, 2 + len(shape))))  # a different size for every axis
    sizes = call(*with_flow(args, probe), **with_flow(kwargs, probe)).shape
    if len(sizes) == len(shape):
        return frozenset(dim for dim, size in enumerate(sizes) if size != probe.shape[dim]), True
    return frozenset(range(len(shape))) - {size - 2 for size in sizes}, False


def moves_only(call: Callable[..., Any], args: Any, kwargs: Any, tensor: Tensor) -> bool:
    """Whether a function only moves numbers about: done to their places, it tells which went where."""
    places = torch.arange(tensor.numel(), dtype=torch.float64).reshape(tensor.shape)
    try:
        moved = call(*with_flow(args, places), **with_flow(kwargs, places))
        result = call(*plain(args), **plain(kwargs))
    except (RuntimeError, TypeError, ValueError):
        return False
    if not isinstance(moved, Tensor) or not isinstance(result, Tensor) or moved.numel() < 2:
        return False
    index = moved.round().clamp(0, tensor.numel() - 1).long()
    return torch.equal(index.double(), moved) and torch.equal(tensor.reshape(-1)[index], result)


def with_flow(value: Any, tensor: Tensor) -> Any:
    """Arguments with one tensor for every Flow."""
    return tree_map_only(LabelledTensor, lambda _: tensor, value)
