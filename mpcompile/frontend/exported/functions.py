"""Functions and methods of torch for aten operators, as Python code of a model would call them.

Passes recognise operators by these names. An operator without a rule here stays an aten operator, which computes the
same.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mpcompile.frontend.exported.simplify import base_name, named_arguments

PLACEMENT = frozenset(["layout", "device", "pin_memory"])


@dataclass(frozen=True, slots=True)
class Call:
    """A node to be: its kind (call_function or call_method), target and arguments."""

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


Rule = Callable[[fx.Node, Mapping[str, Any]], Call | None]
OPERATORS = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "neg": operator.neg,
    "matmul": torch.matmul, "bmm": torch.bmm,
}  # fmt: skip
# Same arguments in the same order as the aten operator.
SAME_ARGUMENTS: Mapping[str, Callable[..., Any]] = {
    **{
        name: getattr(F, name)
        for name in (
            "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "relu",
            "gelu", "silu", "hardswish", "hardsigmoid", "hardtanh", "leaky_relu", "mish", "softplus", "celu", "selu",
            "glu", "avg_pool2d", "adaptive_avg_pool2d", "pad", "one_hot", "pixel_shuffle", "pixel_unshuffle", "relu6",
        )
    },
    **{
        name: getattr(torch, name)
        for name in (
            "max_pool1d", "max_pool2d", "max_pool3d", "cat", "stack", "where", "einsum", "rsub", "meshgrid", "arange",
            "zeros", "ones", "full", "linspace", "tril", "triu", "outer", "baddbmm", "addmm", "pow", "polar", "complex",
            "scalar_tensor", "channel_shuffle", "broadcast_tensors", "hstack", "vstack",
        )
    },
}  # fmt: skip
INTERPOLATIONS = {
    "upsample_nearest1d": "nearest", "upsample_nearest2d": "nearest", "upsample_linear1d": "linear",
    "upsample_bilinear2d": "bilinear", "upsample_bicubic2d": "bicubic", "upsample_trilinear3d": "trilinear",
    "_upsample_bilinear2d_aa": "bilinear", "_upsample_bicubic2d_aa": "bicubic",
}  # fmt: skip
RENAMED = {"_unsafe_view": "view", "concat": "cat", "concatenate": "cat", "_safe_softmax": "softmax"}
# Tensors have a method of this name, but the operator's first argument is another one, or its arguments differ.
NO_METHOD = frozenset(["index", "embedding", "layer_norm", "group_norm", "batch_norm", "size", "norm", "rms_norm"])


def torch_call(node: fx.Node) -> Call | None:
    """The call of torch that computes what an aten operator computes; None if there is no rule."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return None
    name = RENAMED.get(base_name(node), base_name(node))
    given = {key: value for key, value in node.kwargs.items() if key not in PLACEMENT}
    if (rule := RULES.get(name)) is not None:
        return rule(node, named_arguments(node))
    if name in OPERATORS and not given:
        return Call("call_function", OPERATORS[name], node.args)
    if name in INTERPOLATIONS:
        return _interpolate(node, name)
    if name in SAME_ARGUMENTS:
        return Call("call_function", SAME_ARGUMENTS[name], node.args, given)
    takes_tensor = bool(node.args) and isinstance(node.args[0], fx.Node) and node.args[0].meta.get("shape") is not None
    if takes_tensor and hasattr(Tensor, name) and name not in NO_METHOD and not name.startswith("_"):
        return Call("call_method", name, node.args, given)
    return None


def _layer_norm(node: fx.Node, found: Mapping[str, Any]) -> Call:
    args = (found["input"], tuple(found["normalized_shape"]), found["weight"], found["bias"], found["eps"])
    return Call("call_function", F.layer_norm, args)


def _group_norm(node: fx.Node, found: Mapping[str, Any]) -> Call:
    args = (found["input"], found["num_groups"], found["weight"], found["bias"], found["eps"])
    return Call("call_function", F.group_norm, args)


def _batch_norm(node: fx.Node, found: Mapping[str, Any]) -> Call:
    args = (found["input"], found["running_mean"], found["running_var"], found["weight"], found["bias"], False)
    return Call("call_function", F.batch_norm, (*args, found["momentum"], found["eps"]))


def _attention(node: fx.Node, found: Mapping[str, Any]) -> Call:
    options = {
        key: found[key]
        for key in ("attn_mask", "is_causal", "scale", "enable_gqa")
        if found.get(key) not in (None, False)
    }
    return Call(
        "call_function", F.scaled_dot_product_attention, (found["query"], found["key"], found["value"]), options
    )


def _embedding(node: fx.Node, found: Mapping[str, Any]) -> Call:
    return Call("call_function", F.embedding, (found["indices"], found["weight"]))


def _elu(node: fx.Node, found: Mapping[str, Any]) -> Call | None:
    if found["scale"] != 1 or found["input_scale"] != 1:
        return None
    return Call("call_function", F.elu, (found["self"], found["alpha"]))


def _softmax(node: fx.Node, found: Mapping[str, Any]) -> Call:
    options = {} if found.get("dtype") is None else {"dtype": found["dtype"]}
    return Call("call_method", base_name(node).strip("_").replace("safe_", ""), (found["self"], found["dim"]), options)


def _constant_pad(node: fx.Node, found: Mapping[str, Any]) -> Call:
    return Call("call_function", F.pad, (found["self"], found["pad"], "constant", found["value"]))


def _sym_size(node: fx.Node, found: Mapping[str, Any]) -> Call | None:
    return Call("call_method", "size", (found["self"], found["dim"])) if "dim" in found else None


def _select(node: fx.Node, found: Mapping[str, Any]) -> Call | None:
    return _indexed(found["self"], found["dim"], found["index"])


def _slice(node: fx.Node, found: Mapping[str, Any]) -> Call | None:
    end = None if isinstance(found["end"], int) and found["end"] >= 2**62 else found["end"]
    start = None if found["start"] == 0 else found["start"]
    return _indexed(found["self"], found["dim"], slice(start, end, None if found["step"] == 1 else found["step"]))


def _indexed(x: Any, dim: int, index: Any) -> Call | None:
    """`x[:, :, index]` with the index on this axis."""
    shape = x.meta.get("shape")
    if shape is None:
        return None
    return Call("call_function", operator.getitem, (x, (*[slice(None)] * (dim % len(shape)), index)))


def _index(node: fx.Node, found: Mapping[str, Any]) -> Call:
    indices = tuple(slice(None) if index is None else index for index in found["indices"])
    return Call("call_function", operator.getitem, (found["self"], indices))


def _to(node: fx.Node, found: Mapping[str, Any]) -> Call | None:
    if found.get("other") is not None:
        return Call("call_method", "to", (found["self"], found["other"]))
    options = {} if found.get("memory_format") is None else {"memory_format": found["memory_format"]}
    dtype = found.get("dtype")
    return Call("call_method", "to", (found["self"], dtype), options) if dtype is not None else None


def _divide(node: fx.Node, found: Mapping[str, Any]) -> Call:
    if found.get("rounding_mode") is None:
        return Call("call_function", operator.truediv, (found["self"], found["other"]))
    return Call("call_function", torch.div, (found["self"], found["other"]), {"rounding_mode": found["rounding_mode"]})


def _vector_norm(node: fx.Node, found: Mapping[str, Any]) -> Call:
    return Call("call_function", torch.linalg.vector_norm, node.args, dict(node.kwargs))


def _interpolate(node: fx.Node, name: str) -> Call | None:
    """F.interpolate for an upsampling operator in the form that F.interpolate itself calls."""
    found = named_arguments(node)
    if node.target._overloadname != "vec":  # type: ignore[union-attr]
        return None
    options: dict[str, Any] = {"mode": INTERPOLATIONS[name]}
    if found.get("output_size") is not None:
        options["size"] = found["output_size"]
    else:
        options["scale_factor"] = found["scale_factors"]
    if found.get("align_corners") is not None:
        options["align_corners"] = found["align_corners"]
    if name.endswith("_aa"):
        options["antialias"] = True
    return Call("call_function", F.interpolate, (found["input"],), options)


RULES: Mapping[str, Rule] = {
    "layer_norm": _layer_norm, "group_norm": _group_norm, "batch_norm": _batch_norm, "embedding": _embedding,
    "scaled_dot_product_attention": _attention, "elu": _elu, "softmax": _softmax, "_softmax": _softmax,
    "log_softmax": _softmax, "_log_softmax": _softmax, "constant_pad_nd": _constant_pad, "sym_size": _sym_size,
    "select": _select, "slice": _slice, "index": _index, "to": _to, "_to_copy": _to, "div": _divide,
    "linalg_vector_norm": _vector_norm,
}  # fmt: skip
