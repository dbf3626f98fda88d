"""The native operator in an ONNX file: its node, its initializers, and its fallback as an ONNX function.

The operators NMGemm and NMConv belong to the domain `mpcompile`. A file that uses one also carries a model-local
function of the same name. Where the kernel's library is registered, ONNX Runtime runs the native kernel. Anywhere else
it inlines the function, which rebuilds the dense weight from the packed streams with standard operators. All of that is
constant, so it is folded when the file is loaded, and ONNX Runtime's own dense MatMul or Conv runs. The results differ
only in rounding. conv_op.py has the convolutions beyond 1×1.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from mpcompile.runtimes.native.packing import Packed

DOMAIN, VERSION = "mpcompile", 1
GEMM, CONV = "NMGemm", "NMConv"
# The operator's names, which are part of the file format, and the fields of Packed that they hold.
STREAMS: Mapping[str, str] = MappingProxyType(
    {"values": "values", "places": "indices", "common": "shared_steps", "order": "row_order"}
)
ATTRIBUTES: Mapping[str, str] = MappingProxyType(
    {"rows": "rows", "columns": "columns", "share": "rows_per_pattern", "block": "block", "chunk": "chunk"}
)
INPUTS = ("x", *STREAMS, "bias")
OLDEST_OPSET = 18  # the fallback uses a ScatterElements that adds


def make_node(
    op: str,
    name: str,
    x: ir.Value,
    streams: Sequence[ir.Value],
    bias: ir.Value,
    packed: Packed,
    more: Mapping[str, Sequence[int]] = MappingProxyType({}),
    residual: ir.Value | None = None,
) -> ir.Node:
    """Returns the node `op(x)` on the `streams` of `packed`; its one output has no name yet.

    `more` are attributes beside those of the packed weight; `residual` is an input after the others.
    """
    attributes = {attribute: getattr(packed, field) for attribute, field in sorted(ATTRIBUTES.items())}
    inputs = [x, *streams, bias, *([] if residual is None else [residual])]
    return ir.node(op, inputs, {**attributes, **more}, domain=DOMAIN, name=name)


def stream_initializers(prefix: str, packed: Packed) -> list[ir.Value]:
    """Returns the packed weight as initializers `prefix.values`, `prefix.places`, `prefix.common`, `prefix.order`."""
    return [initializer(f"{prefix}.{stream}", getattr(packed, field)) for stream, field in STREAMS.items()]


def initializer(name: str, array: np.ndarray) -> ir.Value:
    """Returns an array as an initializer. It has no type or shape of its own, so no value_info is written for it."""
    return ir.Value(name=name, const_value=ir.tensor(array, name=name))


def function(op: str, opset: int) -> onnx.FunctionProto:
    """Returns the fallback of GEMM or CONV in standard operators of `opset`, the opset of the file."""
    body = [*dense_weight()]
    if op == GEMM:
        body += [
            helper.make_node("Transpose", ["weight"], ["turned"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", "turned"], ["product"]),
            helper.make_node("Add", ["product", "bias"], ["y"]),
        ]
    else:
        body += [
            *constants(taps=[2, 3]),
            helper.make_node("Unsqueeze", ["weight", "taps"], ["kernel"]),
            helper.make_node("Conv", ["x", "kernel", "bias"], ["y"], kernel_shape=[1, 1]),
        ]
    return helper.make_function(DOMAIN, op, INPUTS, ["y"], body, [helper.make_opsetid("", opset)], list(ATTRIBUTES))


def dense_weight() -> list[onnx.NodeProto]:
    """Returns nodes that rebuild `weight` (rows, columns): each value is added at row · width + column of zeros.

    The zeros have one more row and one more column than the weight. Padded steps, whose value is 0, are added there.
    """
    node = helper.make_node
    return [
        *constants(zero=0, one=1, first=[0], second=[1], whole=[-1], origin=[0, 0], steps_at=[2], blocks_at=[1, 2, 3]),
        *(_attribute(name) for name in ("rows", "columns", "block")),
        node("Shape", ["values"], ["block_count"], start=0, end=1),
        node("Squeeze", ["block_count"], ["blocks"]),
        node("Mul", ["blocks", "block"], ["covered"]),
        node("Add", ["covered", "one"], ["width"]),
        node("Range", ["zero", "blocks", "one"], ["numbers"]),
        node("Mul", ["numbers", "block"], ["starts_flat"]),
        node("Unsqueeze", ["starts_flat", "blocks_at"], ["starts"]),
        node("Cast", ["places"], ["places_int"], to=onnx.TensorProto.INT64),
        node("Add", ["places_int", "starts"], ["column"]),
        node("Cast", ["order"], ["order_int"], to=onnx.TensorProto.INT64),
        node("Unsqueeze", ["order_int", "steps_at"], ["row"]),
        node("Mul", ["row", "width"], ["row_start"]),
        node("Add", ["row_start", "column"], ["at"]),
        node("Reshape", ["at", "whole"], ["at_flat"]),
        node("Reshape", ["values", "whole"], ["values_flat"]),
        node("Add", ["rows", "one"], ["height"]),
        node("Mul", ["height", "width"], ["size"]),
        node("Unsqueeze", ["size", "first"], ["size_shape"]),
        node("ConstantOfShape", ["size_shape"], ["empty"], value=numpy_helper.from_array(np.zeros(1, np.float32))),
        node("ScatterElements", ["empty", "at_flat", "values_flat"], ["filled"], axis=0, reduction="add"),
        node("Unsqueeze", ["height", "first"], ["height_1"]),
        node("Unsqueeze", ["width", "first"], ["width_1"]),
        node("Concat", ["height_1", "width_1"], ["padded_shape"], axis=0),
        node("Reshape", ["filled", "padded_shape"], ["padded"]),
        node("Unsqueeze", ["rows", "first"], ["rows_1"]),
        node("Unsqueeze", ["columns", "first"], ["columns_1"]),
        node("Concat", ["rows_1", "columns_1"], ["shape"], axis=0),
        node("Slice", ["padded", "origin", "shape"], ["weight"]),
    ]


def constants(**values: int | Sequence[int]) -> list[onnx.NodeProto]:
    """Returns an int64 Constant node per name."""
    return [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(value, np.int64)))
        for name, value in values.items()
    ]


def _attribute(name: str) -> onnx.NodeProto:
    """Returns a node that gives the operator's attribute `name` as a value of the same name."""
    node = helper.make_node("Constant", [], [name])
    node.attribute.add(name="value_int", ref_attr_name=name, type=onnx.AttributeProto.INT)
    return node
