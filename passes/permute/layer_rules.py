"""Channel rules for layers and norms: which weight axis holds which channel ids, and the labels of the output.

- A layer ends its input channels, whose ids are bound to the weight's input axis, and starts new ones for its rows.
- A norm keeps its input's channels and binds them to its per-channel parameters and statistics.

Each rule adds to a ChannelConstraints and returns the labelled output, or None if it does not apply.
`operation` names the graph node in the recorded reasons.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mpcompile.passes.permute.channel_labels import (
    LabelledTensor,
    ids_along,
    labelled_tensors,
    labels_from_ids,
    varying_dims,
    without_labels,
)
from mpcompile.passes.permute.constraints import UNKNOWN, Axis, ChannelConstraints

NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True, slots=True)
class LayerWeight:
    """A Linear's or Conv2d's weight: qualified names, shape, and the activation's axis that its inputs lie on."""

    weight: str
    bias: str | None
    shape: torch.Size
    groups: int
    dim: int


@dataclass(frozen=True, slots=True)
class TensorNames:
    """One qualified name for each parameter and buffer of a graph; a shared tensor has its first name everywhere."""

    by_id: Mapping[int, str]

    @staticmethod
    def of(graph: fx.GraphModule) -> "TensorNames":
        """The names of a graph's parameters and buffers."""
        by_id: dict[int, str] = {}
        for named in (graph.named_parameters(), graph.named_buffers()):
            for name, value in named:
                by_id.setdefault(id(value), name)
        return TensorNames(by_id)

    def attribute(self, module: nn.Module, target: str, attribute: str) -> str | None:
        """The name of a module's parameter or buffer, None if the module has none; `target` names the module."""
        value = getattr(module, attribute, None)
        return None if value is None else self.by_id.get(id(value), f"{target}.{attribute}")


def layer_dim(module: nn.Module) -> int | None:
    """The input axis that a layer sums over: −1 for a Linear, 1 for a Conv2d, None for any other module."""
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return -1
    if isinstance(module, nn.Conv2d) and type(module).forward is nn.Conv2d.forward:
        return 1
    return None


def norm_dim(module: nn.Module) -> int | None:
    """The axis of a norm's per-channel parameters, None for any other module; GroupNorm only with a single group."""
    if isinstance(module, _BatchNorm):
        return 1
    if isinstance(module, nn.LayerNorm) and type(module).forward is nn.LayerNorm.forward:
        return -1
    if isinstance(module, nn.GroupNorm) and type(module).forward is nn.GroupNorm.forward and module.num_groups == 1:
        return 1
    return None


def functional_norm_dim(function: Any, args: Any, kwargs: Any) -> int | None:
    """As `norm_dim`, for the function of a call."""
    if function is F.layer_norm:
        return -1
    if function is F.group_norm and (args[1] if len(args) > 1 else kwargs["num_groups"]) == 1:
        return 1
    return 1 if function is F.batch_norm else None


def module_layer(
    constraints: ChannelConstraints,
    operation: str,
    module: nn.Linear | nn.Conv2d,
    target: str,
    names: TensorNames,
    x: LabelledTensor,
    dim: int,
) -> LabelledTensor:
    """The labelled output of a Linear or Conv2d called as a module; `target` is its name, `dim` its `layer_dim`."""
    layer = LayerWeight(
        weight=names.by_id[id(module.weight)],
        bias=names.attribute(module, target, "bias"),
        shape=module.weight.shape,
        groups=module.groups if isinstance(module, nn.Conv2d) else 1,
        dim=dim,
    )
    return apply_weight(constraints, operation, layer, x, module(x.tensor))


def functional_layer(
    constraints: ChannelConstraints, operation: str, function: Any, args: Any, kwargs: Any
) -> LabelledTensor | None:
    """The labelled output of F.linear or F.conv2d; None if the weight is not a parameter exactly as stored."""
    named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    x, weight, bias = named["input"], named["weight"], named.get("bias")
    if not isinstance(weight, LabelledTensor) or weight.parameter is None or not isinstance(x, LabelledTensor):
        return None
    layer = LayerWeight(
        weight=weight.parameter,
        bias=bias.parameter if isinstance(bias, LabelledTensor) else None,
        shape=weight.tensor.shape,
        groups=kwargs.get("groups", args[6] if len(args) > 6 else 1),
        dim=-1 if function is F.linear else 1,
    )
    y = apply_weight(constraints, operation, layer, x, function(*without_labels(args), **without_labels(kwargs)))
    if isinstance(bias, LabelledTensor) and layer.bias is None:  # a bias computed from several parameters, as in BEiT
        outputs = constraints.axes[Axis(layer.weight, 0)]
        ids = bias.labels[0].numpy() if bias.labels else np.full(len(outputs), UNKNOWN)
        constraints.unify(outputs, ids, operation)
    return y


def apply_weight(
    constraints: ChannelConstraints, operation: str, layer: LayerWeight, x: LabelledTensor, y: Tensor
) -> LabelledTensor:
    """Binds the input's channel ids to the weight's input axis and assigns new ids to its output channels.

    Returns the output `y` with its labels. A Conv2d with several groups has one input axis for each group. The outputs
    of one group may only be permuted among themselves. A depthwise convolution has one row for each input channel, so
    its outputs are the input's channels.
    """
    inputs = _input_ids(constraints, operation, layer, x)
    out, per_group = layer.shape[:2]
    if layer.groups > 1 and per_group == 1 and out == x.tensor.shape[layer.dim]:
        constraints.bind(Axis(layer.weight, 0), inputs, operation)
        outputs = constraints.axes[Axis(layer.weight, 0)]
    else:
        rows = out // layer.groups
        for group in range(layer.groups):
            axis = Axis(layer.weight, 1, None if layer.groups == 1 else (group * rows, (group + 1) * rows))
            constraints.bind(axis, inputs[group * per_group : (group + 1) * per_group], operation)
            constraints.inputs.add(axis)
        if Axis(layer.weight, 0) not in constraints.axes:
            constraints.bind(Axis(layer.weight, 0), constraints.new_ids(out), operation)
        outputs = constraints.axes[Axis(layer.weight, 0)]
        if layer.groups > 1:
            constraints.keep_together(outputs.reshape(layer.groups, rows))
    if layer.bias is not None:
        constraints.bind(Axis(layer.bias, 0), outputs, operation)
    # The layer does the same at every position, so labels along other axes stay valid.
    other_axes = [labels for labels in x.labels if layer.dim % labels.ndim not in varying_dims(labels)]
    kept = tuple(labels.narrow(layer.dim, 0, 1).expand(y.shape) for labels in other_axes)
    return LabelledTensor(y, (labels_from_ids(outputs, y.shape, layer.dim % y.ndim), *kept))


def _input_ids(constraints: ChannelConstraints, operation: str, layer: LayerWeight, x: LabelledTensor) -> "np.ndarray":
    """The channel ids along a layer's input axis; new and fixed ones if the input has no labels along that axis."""
    summed = [labels for labels in x.labels if layer.dim % labels.ndim in varying_dims(labels)]
    for labels in summed[1:]:
        constraints.fix(labels.numpy(), f"{operation} sums over two kinds of channels")
    if summed:
        sequences = ids_along(summed[0], layer.dim)
        for sequence in sequences[1:]:
            constraints.unify(sequences[0], sequence, operation)
        first: np.ndarray = sequences[0]
        return first
    ids = constraints.new_ids(x.tensor.shape[layer.dim])
    unlabelled = "its inputs have no known channels" if constraints.inputs else "it reads the image itself"
    reason = x.lost_reason or ("its inputs are positions, not channels" if x.labels else unlabelled)
    constraints.fix(ids, reason)
    return ids


def module_norm(
    constraints: ChannelConstraints,
    operation: str,
    module: nn.Module,
    target: str,
    names: TensorNames,
    x: LabelledTensor,
    dim: int,
) -> LabelledTensor | None:
    """The labelled output of a norm called as a module; None for a LayerNorm over several axes.

    `target` is the module's name, `dim` its `norm_dim`.
    LayerNorm and GroupNorm take statistics over all channels, which therefore may only be permuted among themselves.
    """
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
        return None
    y = module(x.tensor)
    parameters = [name for part in NORM_TENSORS if (name := names.attribute(module, target, part))]
    for sequences in _channels_along(x, dim):
        for name in parameters:
            for sequence in sequences:
                constraints.bind(Axis(name, 0), sequence, operation)
        if not isinstance(module, _BatchNorm):
            constraints.keep_together(sequences)
    return LabelledTensor(y, x.labels)


def functional_norm(
    constraints: ChannelConstraints, operation: str, function: Any, args: Any, kwargs: Any, dim: int
) -> LabelledTensor | None:
    """As `module_norm`, for layer_norm, group_norm or batch_norm of torch.nn.functional."""
    x, *rest = args
    if dim == -1 and len(args[1] if len(args) > 1 else kwargs["normalized_shape"]) != 1:
        return None
    parameters = [value for value in labelled_tensors((rest, kwargs)) if value.labels]
    for sequences in _channels_along(x, dim):
        for parameter in parameters:
            for sequence in sequences:
                constraints.unify(sequence, parameter.labels[0].numpy(), operation)
        if function is not F.batch_norm:
            constraints.keep_together(sequences)
    return LabelledTensor(function(*without_labels(args), **without_labels(kwargs)), x.labels)


def _channels_along(x: LabelledTensor, dim: int) -> Iterator["np.ndarray"]:
    """The sequences of channel ids along an axis, (sequences, size), from each label tensor that varies there."""
    for labels in x.labels:
        if dim % labels.ndim in varying_dims(labels):
            yield ids_along(labels, dim)
