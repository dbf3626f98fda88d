"""Layers of torch.nn for operators that read a parameter "path.weight", under the layer's own name."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpcompile.frontend.exported.simplify import base_name, named_arguments

CONVOLUTIONS: Mapping[str, Callable[..., nn.Module]] = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}
BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
LAYERS = frozenset([*CONVOLUTIONS, "linear", "layer_norm", "group_norm", "batch_norm"])
TENSORS = ("weight", "bias", "running_mean", "running_var")


def layer_of(node: fx.Node, tensors: Mapping[str, Tensor]) -> tuple[str, nn.Module] | None:
    """Name and layer that an operator is a call of, on its first argument; None if it is no plain call of a layer.

    All tensors that it reads must be parameters and buffers of one module, under the names that torch.nn uses.
    """
    if not isinstance(node.target, torch._ops.OpOverload) or base_name(node) not in LAYERS:
        return None
    found = named_arguments(node)
    owner = _owner(found.get("weight"), "weight")
    if not owner:
        return None
    tied = _owner(found.get("bias"), "bias")  # export keeps one name of a weight that two layers share
    if (
        tied
        and tied != owner
        and tensors.get(f"{tied}.weight", tensors[f"{owner}.weight"]) is tensors[f"{owner}.weight"]
    ):
        owner = tied
    own: dict[str, Tensor] = {}
    for name in TENSORS:
        value = found.get(name)
        if value is None:
            continue
        if _owner(value, name) != owner and name != "weight":
            return None
        own[name] = tensors[str(value.target)]
    layer = _empty_layer(node, found, own)
    if layer is None:
        return None
    for name, tensor in own.items():
        if name in layer._parameters:
            layer._parameters[name] = (
                tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
            )
        else:
            layer._buffers[name] = tensor
    if "num_batches_tracked" in layer._buffers:
        layer._buffers["num_batches_tracked"] = tensors.get(f"{owner}.num_batches_tracked")
    return owner, layer.eval()


def _owner(node: object, name: str) -> str | None:
    """The module that a `get_attr` node of `owner.name` belongs to; None for another node or another name."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    owner, _, last = str(node.target).rpartition(".")
    return owner if last == name else None


def _empty_layer(node: fx.Node, found: Mapping[str, Any], own: Mapping[str, Tensor]) -> nn.Module | None:
    """The layer with these arguments, without values."""
    weight, has_bias, name = own["weight"], "bias" in own, base_name(node)
    if name == "linear":
        return nn.Linear(weight.shape[1], weight.shape[0], bias=has_bias, device="meta") if weight.ndim == 2 else None
    if name in CONVOLUTIONS:
        sizes = {
            key: found[key] if isinstance(found[key], str) else _repeated(found[key], weight.ndim - 2)
            for key in ("stride", "padding", "dilation")
        }
        kind, groups = CONVOLUTIONS[name], found["groups"]
        return kind(
            weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), groups=groups, bias=has_bias,
            device="meta", **sizes,
        )  # fmt: skip
    if name == "layer_norm":
        shape = tuple(found["normalized_shape"])
        return nn.LayerNorm(shape, found["eps"], bias=has_bias, device="meta") if weight.shape == shape else None
    if name == "group_norm" and has_bias:
        return nn.GroupNorm(found["num_groups"], len(weight), found["eps"], device="meta")
    of_input = node.args[0].meta.get("shape") if isinstance(node.args[0], fx.Node) else None
    if name == "batch_norm" and has_bias and "running_mean" in own and "running_var" in own and of_input:
        return BATCH_NORMS[len(of_input)](len(weight), found["eps"], found["momentum"], device="meta")
    return None


def _repeated(sizes: Any, count: int) -> tuple[Any, ...]:
    """Sizes of a convolution, one for each axis."""
    return tuple(sizes) * count if len(sizes) == 1 else tuple(sizes)


def same_layer(one: nn.Module, other: nn.Module) -> bool:
    """Whether two layers compute the same: their type, settings and tensors are equal."""
    return (
        type(one) is type(other)
        and one.extra_repr() == other.extra_repr()
        and all(getattr(one, name, None) is getattr(other, name, None) for name in TENSORS if name != "weight")
        and one.weight is other.weight
    )
