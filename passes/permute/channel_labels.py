"""LabelledTensor: an activation with the channel id of each of its elements.

A label tensor is an integer tensor of the activation's shape that holds channel ids. It varies only along the axes that
the channels lie on; along the others it is a broadcast view, so that it needs little memory.
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
    """A tensor and its label tensors, one for each axis or group of axes with traced channels.

    `parameter` is the qualified name if the tensor is a parameter or buffer exactly as stored. `lost_reason` says which
    operation ended the tracing, if one did.
    """

    tensor: Tensor
    labels: tuple[Tensor, ...] = ()
    parameter: str | None = None
    lost_reason: str | None = None


def varying_dims(labels: Tensor) -> frozenset[int]:
    """The axes along which a label tensor is not constant."""
    dims = set()
    for dim, (size, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True)):
        if size > 1 and stride != 0 and not torch.equal(labels, labels.narrow(dim, 0, 1).expand_as(labels)):
            dims.add(dim)
    return frozenset(dims)


def compact(labels: Tensor, keep: Sequence[int] = ()) -> Tensor:
    """The label tensor cut to size 1 along each axis on which it is constant, except the axes in `keep`."""
    dims = varying_dims(labels)
    for dim in range(labels.ndim):
        if dim not in dims and dim not in keep:
            labels = labels.narrow(dim, 0, 1)
    return labels


def ids_along(labels: Tensor, dim: int) -> "np.ndarray":
    """The distinct sequences of channel ids along one axis: (sequences, size of the axis)."""
    rows = compact(labels, [dim % labels.ndim]).movedim(dim, -1)
    distinct: np.ndarray = np.unique(rows.reshape(-1, rows.shape[-1]).numpy(), axis=0)
    return distinct


def labels_from_ids(ids: "np.ndarray", shape: Sequence[int], dim: int) -> Tensor:
    """A label tensor of this shape with the given ids along one axis."""
    sizes = [1] * len(shape)
    sizes[dim] = len(ids)
    return torch.from_numpy(ids).reshape(sizes).expand(tuple(shape))


# ---- arguments and results of operators, nested in tuples, lists and dicts


def labelled_tensors(value: Any) -> list[LabelledTensor]:
    """Every LabelledTensor in nested arguments."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, LabelledTensor)]


def without_labels(value: Any) -> Any:
    """The arguments with each LabelledTensor replaced by its tensor."""
    return tree_map_only(LabelledTensor, lambda labelled: labelled.tensor, value)


def with_replacement(value: Any, replaced: LabelledTensor, tensor: Tensor) -> Any:
    """The arguments with one LabelledTensor, found by identity, replaced by a tensor."""
    return tree_map_only(LabelledTensor, lambda other: tensor if other is replaced else other, value)


def with_all_replaced(value: Any, tensor: Tensor) -> Any:
    """The arguments with every LabelledTensor replaced by the same tensor."""
    return tree_map_only(LabelledTensor, lambda _: tensor, value)


def unlabelled(result: Any, lost_reason: str | None = None) -> Any:
    """The result with each tensor wrapped in a LabelledTensor that has no labels."""
    return tree_map_only(Tensor, lambda tensor: LabelledTensor(tensor, lost_reason=lost_reason), result)


def attach_labels(result: Any, labels: list[Any]) -> Any:
    """A result, or a tuple of results, with its label tensors; each entry of `labels` has the result's structure."""
    if isinstance(result, Tensor):
        return LabelledTensor(result, tuple(compact(part).expand(result.shape) for part in labels))
    return tuple(attach_labels(part, [entry[index] for entry in labels]) for index, part in enumerate(result))


# ---- properties of an operator, found by running it


def reduced_dims(shape: torch.Size, call: Callable[..., Any], args: Any, kwargs: Any) -> tuple[frozenset[int], bool]:
    """The axes that a reduction removes, and whether it keeps them with size 1; read off its result's shape."""
    probe = torch.zeros(tuple(range(2, 2 + len(shape))))  # a different size for every axis
    sizes = call(*with_all_replaced(args, probe), **with_all_replaced(kwargs, probe)).shape
    if len(sizes) == len(shape):
        return frozenset(dim for dim, size in enumerate(sizes) if size != probe.shape[dim]), True
    return frozenset(range(len(shape))) - {size - 2 for size in sizes}, False


def only_moves_elements(call: Callable[..., Any], args: Any, kwargs: Any, tensor: Tensor) -> bool:
    """Whether a function only permutes or copies the elements of `tensor`.

    Tested by applying it to the element indices: the result must be indices, and must predict the function's real
    result.
    """
    positions = torch.arange(tensor.numel(), dtype=torch.float64).reshape(tensor.shape)
    try:
        moved = call(*with_all_replaced(args, positions), **with_all_replaced(kwargs, positions))
        result = call(*without_labels(args), **without_labels(kwargs))
    except (RuntimeError, TypeError, ValueError):
        return False
    if not isinstance(moved, Tensor) or not isinstance(result, Tensor) or moved.numel() < 2:
        return False
    index = moved.round().clamp(0, tensor.numel() - 1).long()
    return torch.equal(index.double(), moved) and torch.equal(tensor.reshape(-1)[index], result)
