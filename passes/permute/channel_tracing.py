"""Traces channels through a graph: which channel each element of each activation belongs to.

Every channel of every activation has an id. The graph is run once on its example input. Each tensor t carries label
tensors: integer tensors of t's shape that hold the channel id of each element. A label tensor varies along the axes
that its channels lie on (the channel axis, or heads and head width). A tensor whose tokens and channels are both mixed
by later layers carries two.

- Data movement (reshape, transpose, chunk, roll, flatten …) is applied to the label tensors as to the tensor, so its
  effect need not be modelled.
- An elementwise operation on two tensors (addition, scaling by a parameter) unifies the ids that it combines.
- A layer ends its input channels, whose ids are bound to its weight's input axis, and starts new ones for its outputs
  (passes/permute/layer_rules.py).
- A matrix product of two activations fixes the channels that it sums over (passes/permute/product_rules.py).
- A reduction, a norm or a product within a head requires that a set of channels stays together.
- Any other operation fixes the channels that reach it, with the reason.

The result is a ChannelConstraints; passes/permute/coupling.py derives groups of channels from it.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from mpcompile.analysis.operator_sets import (
    CONCATENATION_NAMES,
    DATA_MOVEMENT_MODULES,
    DATA_MOVEMENT_NAMES,
    ELEMENTWISE_MODULES,
    ELEMENTWISE_NAMES,
    MATRIX_PRODUCT_NAMES,
    REDUCTION_NAMES,
    RESHAPE_AS_NAMES,
    SHAPE_QUERY_NAMES,
    SPATIAL_MODULES,
    SPATIAL_NAMES,
    WEIGHT_FUNCTIONS,
)
from mpcompile.passes.permute.channel_labels import (
    LabelledTensor,
    attach_labels,
    compact,
    labelled_tensors,
    labels_from_ids,
    only_moves_elements,
    reduced_dims,
    unlabelled,
    varying_dims,
    with_replacement,
    without_labels,
)
from mpcompile.passes.permute.constraints import CONSTANT, UNKNOWN, Axis, ChannelConstraints
from mpcompile.passes.permute.layer_rules import (
    TensorNames,
    functional_layer,
    functional_norm,
    functional_norm_dim,
    layer_dim,
    module_layer,
    module_norm,
    norm_dim,
)
from mpcompile.passes.permute.product_rules import attention, matrix_product


class ChannelTracer(fx.Interpreter):
    """Runs a graph on LabelledTensors and collects `constraints` on the order of its channels."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.constraints = ChannelConstraints()
        self._names = TensorNames.of(graph)
        self._parameters: dict[str, Tensor] = {}  # the label tensor of each parameter fetched so far
        self._operation = ""  # the current node, for reasons

    def run_node(self, n: fx.Node) -> Any:
        """The node's result, each tensor as a LabelledTensor."""
        self._operation = f"{n.name} ({getattr(n.target, '__name__', n.target)})"
        return super().run_node(n)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The image, without labels: its channels are not reordered."""
        return LabelledTensor(super().placeholder(target, args, kwargs))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A parameter or buffer, with new channel ids along its last axis longer than 1."""
        value = super().get_attr(target, args, kwargs)
        if not isinstance(value, Tensor):
            return value
        name = self._names.by_id.get(id(value))
        dims = [dim for dim, size in enumerate(value.shape) if size > 1]
        if name is None or not dims or not value.is_floating_point():
            return LabelledTensor(value)
        if name not in self._parameters:
            axis = Axis(name, dims[-1])
            self.constraints.bind(axis, self.constraints.new_ids(value.shape[axis.dim]), self._operation)
            self._parameters[name] = labels_from_ids(self.constraints.axes[axis], value.shape, axis.dim)
        return LabelledTensor(value, (self._parameters[name],), name)

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The graph's outputs, whose channels are fixed: their order is the model's interface."""
        for x in labelled_tensors(args):
            for labels in x.labels:
                self.constraints.fix(labels.numpy(), "its order is that of the model's outputs")
        return super().output(target, args, kwargs)

    # ---- choice of the rule

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The result of a function on LabelledTensors."""
        if target in WEIGHT_FUNCTIONS:
            result = functional_layer(self.constraints, self._operation, target, args, kwargs)
            return self._unsupported(target, args, kwargs) if result is None else result
        dim = functional_norm_dim(target, args, kwargs)
        if dim is not None:
            result = functional_norm(self.constraints, self._operation, target, args, kwargs, dim)
            return self._unsupported(target, args, kwargs) if result is None else result
        return self._by_name(target.__name__, target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The result of a tensor's method."""

        def call(tensor: Any, *rest: Any, **named: Any) -> Any:
            return getattr(tensor, target)(*rest, **named)

        return self._by_name(str(target), call, args, kwargs)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The result of a module: a layer, a norm, or an operation without weights."""
        module = self.fetch_attr(target)
        if (dim := layer_dim(module)) is not None:
            return module_layer(self.constraints, self._operation, module, target, self._names, args[0], dim)
        if (dim := norm_dim(module)) is not None:
            y = module_norm(self.constraints, self._operation, module, target, self._names, args[0], dim)
            return self._unsupported(module, args[:1], {}) if y is None else y
        if isinstance(module, ELEMENTWISE_MODULES):
            return self._elementwise(module, args, kwargs)
        if isinstance(module, SPATIAL_MODULES):
            return self._spatial(module, args, kwargs)
        if isinstance(module, DATA_MOVEMENT_MODULES):
            return self._move(module, args, kwargs)
        if isinstance(module, nn.Softmax):
            return self._softmax(module, args, kwargs, module.dim)
        self._operation = f"{target} ({type(module).__name__})"
        return self._unsupported(module, args, kwargs)

    def _by_name(self, name: str, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The result of a function or method, by the rule for its name."""
        if call is operator.getitem and not isinstance(args[0], LabelledTensor):  # one result of a tuple
            return args[0][args[1]]
        operands = labelled_tensors((args, kwargs))
        if not any(x.labels for x in operands):
            return unlabelled(call(*without_labels(args), **without_labels(kwargs)), _lost_reason(operands))
        if call is getattr or name in SHAPE_QUERY_NAMES:
            return unlabelled(call(*without_labels(args), **without_labels(kwargs)))
        if name in ELEMENTWISE_NAMES:
            return self._elementwise(call, args, kwargs)
        if name in DATA_MOVEMENT_NAMES and not labelled_tensors((args[1:], kwargs)):
            return self._move(call, args, kwargs)
        if name in RESHAPE_AS_NAMES:
            return self._move(call, (args[0], *without_labels(args[1:])), without_labels(kwargs))
        if name in CONCATENATION_NAMES:
            return self._concatenate(call, args, kwargs)
        if name in REDUCTION_NAMES:
            return self._reduce(call, args, kwargs)
        if name in SPATIAL_NAMES:
            return self._spatial(call, args, kwargs)
        if name == "pad":
            return self._pad(call, args, kwargs)
        if name == "softmax":
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            return self._softmax(call, args, kwargs, dim)
        if name in MATRIX_PRODUCT_NAMES:
            result = matrix_product(self.constraints, self._operation, call, args, kwargs)
            return self._unsupported(call, args, kwargs) if result is None else result
        if name == "scaled_dot_product_attention":
            return attention(self.constraints, self._operation, call, args, kwargs)
        return self._unsupported(call, args, kwargs)

    # ---- rules for operations without weights

    def _unsupported(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """An operation without a rule: data movement if a test shows it, otherwise its channels are fixed."""
        operands = labelled_tensors((args, kwargs))
        if len(operands) == 1 and operands[0].labels and only_moves_elements(call, args, kwargs, operands[0].tensor):
            return self._move(call, args, kwargs)
        reason = f"channel tracing has no rule for {self._operation}"
        for x in operands:
            for labels in x.labels:
                self.constraints.fix(labels.numpy(), reason)
        return unlabelled(call(*without_labels(args), **without_labels(kwargs)), reason)

    def _elementwise(self, call: Callable[..., Any], args: Any, kwargs: Any) -> LabelledTensor:
        """An elementwise operation: ids at the same position of its operands are one channel."""
        result = call(*without_labels(args), **without_labels(kwargs))
        merged: list[Tensor] = []  # the result's label tensors; no two of them vary along the same axis
        operands = labelled_tensors((args, kwargs))
        for x in operands:
            for labels in x.labels:
                broadcast = labels.expand(result.shape)
                overlapping = [i for i, other in enumerate(merged) if varying_dims(other) & varying_dims(broadcast)]
                if not overlapping:
                    merged.append(broadcast)
                    continue
                first, *others = overlapping
                keep = sorted(varying_dims(broadcast) | varying_dims(merged[first]))
                pair = (compact(merged[first], keep).numpy(), compact(broadcast, keep).numpy())
                self.constraints.unify(*pair, self._operation)
                # The two are unified, so the one that varies along fewer axes holds the same information.
                merged[first] = min(merged[first], broadcast, key=lambda part: len(varying_dims(part)))
                for index in others:
                    self.constraints.fix(merged[index].numpy(), f"{self._operation} mixes two kinds of channels")
        for labels in merged:
            if not all(_matches_channels(x, labels) for x in operands):
                reason = f"{self._operation} combines it with values of no known channel"
                self.constraints.fix(labels.numpy(), reason)
        return LabelledTensor(result, tuple(merged), lost_reason=_lost_reason(operands))

    def _move(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Data movement, applied to the tensor and to its label tensors."""
        [x] = labelled_tensors((args, kwargs))
        result = call(*without_labels(args), **without_labels(kwargs))

        def moved(labels: Tensor) -> Any:
            return call(*with_replacement(args, x, labels), **with_replacement(kwargs, x, labels))

        return attach_labels(result, [moved(labels) for labels in x.labels])

    def _pad(self, call: Callable[..., Any], args: Any, kwargs: Any) -> LabelledTensor:
        """Padding: a constant is the same for all channels; other modes copy elements and their ids."""
        x, pad = args[0], kwargs.get("pad", args[1] if len(args) > 1 else None)
        mode = kwargs.get("mode", args[2] if len(args) > 2 else "constant")
        result = call(*without_labels(args), **without_labels(kwargs))
        if mode != "constant":
            padded = [F.pad(labels.double(), pad, mode=mode).long() for labels in x.labels]
        else:
            padded = [F.pad(labels, pad, value=CONSTANT) for labels in x.labels]
        return LabelledTensor(result, tuple(padded))

    def _concatenate(self, call: Callable[..., Any], args: Any, kwargs: Any) -> LabelledTensor:
        """Concatenation of tensors and of their label tensors; elements without a label are UNKNOWN."""
        if any(len(x.labels) > 1 for x in labelled_tensors((args, kwargs))):
            fixed: LabelledTensor = self._unsupported(call, args, kwargs)
            return fixed

        def labels_of(x: LabelledTensor) -> Tensor:
            return x.labels[0] if x.labels else torch.full(x.tensor.shape, UNKNOWN)

        labels = call(
            *tree_map_only(LabelledTensor, labels_of, args), **tree_map_only(LabelledTensor, labels_of, kwargs)
        )
        return LabelledTensor(call(*without_labels(args), **without_labels(kwargs)), (labels,))

    def _reduce(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A reduction, symmetric in the axes it removes: channels along them may only be permuted among themselves."""
        [x] = labelled_tensors(args) if len(labelled_tensors(args)) == 1 else [None]
        result = call(*without_labels(args), **without_labels(kwargs))
        if x is None or not isinstance(result, Tensor):
            return self._unsupported(call, args, kwargs)
        removed, keepdim = reduced_dims(x.tensor.shape, call, args, kwargs)
        kept = []
        for labels in x.labels:
            dims = varying_dims(labels)
            if not dims & removed:
                for dim in sorted(removed, reverse=True):
                    labels = labels.narrow(dim, 0, 1) if keepdim else labels.select(dim, 0)
                kept.append(labels)
            elif dims <= removed:
                self.constraints.keep_together(compact(labels).reshape(1, -1).numpy())
            else:
                self.constraints.fix(labels.numpy(), f"{self._operation} reduces over some of its channels")
        return LabelledTensor(result, tuple(kept))

    def _spatial(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Pooling or resizing along the last two axes, the same for every channel on other axes."""
        operands = labelled_tensors((args, kwargs))
        result = call(*without_labels(args), **without_labels(kwargs))
        if len(operands) != 1 or not isinstance(result, Tensor):
            return self._unsupported(call, args, kwargs)
        kept = []
        for labels in operands[0].labels:
            if varying_dims(labels) & {labels.ndim - 1, labels.ndim - 2}:
                self.constraints.fix(labels.numpy(), f"{self._operation} pools over its channels")
            else:
                kept.append(labels[..., :1, :1].expand(result.shape))
        return LabelledTensor(result, tuple(kept))

    def _softmax(self, call: Callable[..., Any], args: Any, kwargs: Any, dim: int | None) -> LabelledTensor:
        """Softmax: elementwise for channels on other axes; channels along its axis are fixed."""
        x = labelled_tensors((args, kwargs))[0]
        for labels in x.labels:
            if dim is None or dim % labels.ndim in varying_dims(labels):
                self.constraints.fix(labels.numpy(), f"{self._operation} normalises over its channels")
        return LabelledTensor(call(*without_labels(args), **without_labels(kwargs)), x.labels)


def _lost_reason(operands: list[LabelledTensor]) -> str | None:
    """The reason from the first operand whose tracing was ended by an operation."""
    return next((x.lost_reason for x in operands if x.lost_reason), None)


def _matches_channels(x: LabelledTensor, labels: Tensor) -> bool:
    """Whether the operand is broadcast over the labelled channels, or is itself labelled along one of their axes."""
    offset = labels.ndim - x.tensor.ndim
    dims = varying_dims(labels)
    if any(dim + offset in dims for own in x.labels for dim in varying_dims(own)):
        return True  # its ids have been unified with these
    return not any(dim >= offset and x.tensor.shape[dim - offset] > 1 for dim in dims)
