"""Channel rules for products of activations: matrix products and scaled_dot_product_attention.

Each rule adds to a ChannelConstraints and returns the labelled output. `operation` names the graph node in the recorded
reasons.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mpcompile.passes.permute.channel_labels import (
    LabelledTensor,
    ids_along,
    labelled_tensors,
    varying_dims,
    without_labels,
)
from mpcompile.passes.permute.constraints import ChannelConstraints


def matrix_product(
    constraints: ChannelConstraints, operation: str, call: Callable[..., Any], args: Any, kwargs: Any
) -> LabelledTensor | None:
    """The labelled product of two activations; None unless both are positional arguments."""
    if len(labelled_tensors((args, kwargs))) != 2 or len(args) < 2:
        return None
    a, b = args[0], args[1]
    result = call(*without_labels(args), **without_labels(kwargs))
    labels = [
        *_labels_from_operand(constraints, operation, a, -1, -2, result.shape),
        *_labels_from_operand(constraints, operation, b, -2, -1, result.shape),
    ]
    return LabelledTensor(result, tuple(labels))


def attention(
    constraints: ChannelConstraints, operation: str, call: Callable[..., Any], args: Any, kwargs: Any
) -> LabelledTensor:
    """The labelled output of softmax(q kᵀ) v for each head: it has the channels of v; those of q and k are fixed."""
    named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
    result = call(*without_labels(args), **without_labels(kwargs))
    for name in ("query", "key"):
        for labels in named[name].labels:
            constraints.fix(labels.numpy(), "queries and keys are multiplied with each other, channel by channel")
    labels = _labels_from_operand(constraints, operation, named["value"], -2, -1, result.shape)
    return LabelledTensor(result, tuple(labels))


def _labels_from_operand(
    constraints: ChannelConstraints, operation: str, x: LabelledTensor, summed: int, kept: int, shape: torch.Size
) -> Iterator[Tensor]:
    """The label tensors of a product of this shape that come from one operand.

    `summed` is the operand's contracted axis, whose channels are fixed; `kept` is its other matrix axis.
    """
    for labels in x.labels:
        dims = varying_dims(labels)
        if summed % labels.ndim in dims:
            constraints.fix(labels.numpy(), f"{operation} multiplies it with another activation")
            continue
        if kept % labels.ndim in dims and len(dims) > 1:  # several heads, each with a product of its own
            constraints.keep_together(ids_along(labels, kept))
        yield labels.narrow(summed % labels.ndim, 0, 1).expand(shape)
