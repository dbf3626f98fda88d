"""Streams -> an ONNX node of the domain `mpcompile`, its initializers, and the function that it also is.

A file carries for each operator a model-local function of the same name. ONNX Runtime takes the native kernel where
the library is registered; anywhere else it puts the function's body in, which rebuilds the dense weight from the
streams out of plain operators. All of that is constant, so it is folded when the file is loaded, and what runs is the
runtime's own dense MatMul or Conv. Only the rounding differs.
"""

from collections.abc import Sequence

import numpy as np
import onnx
from jaxtyping import Float32
from onnx import helper, numpy_helper

from mpcompile.runtimes.native.packing import Packed

DOMAIN, VERSION = "mpcompile", 1
GEMM, CONV = "NMGemm", "NMConv"
INPUTS = ("x", "values", "places", "common", "order", "bias")
ATTRIBUTES = ("rows", "columns", "share", "block", "chunk")
OLDEST_OPSET = 18  # ScatterElements that adds


def make_node(op: str, name: str, x: str, y: str, prefix: str, bias: str, packed: Packed) -> onnx.NodeProto:
    """The node `y = op(x)`; its streams are the initializers that `initializers(prefix, …)` names."""
    streams = [f"{prefix}.{part}" for part in INPUTS[1:-1]]
    attributes = {attribute: getattr(packed, attribute) for attribute in ATTRIBUTES}
    return helper.make_node(op, [x, *streams, bias], [y], name=name, domain=DOMAIN, **attributes)


def initializers(prefix: str, packed: Packed) -> list[onnx.TensorProto]:
    """The streams as `prefix.values`, `prefix.places`, `prefix.common`, `prefix.order`."""
    return [numpy_helper.from_array(getattr(packed, part), f"{prefix}.{part}") for part in INPUTS[1:-1]]


def bias_initializer(name: str, bias: Float32[np.ndarray, " rows"]) -> onnx.TensorProto:
    """The bias as an initializer."""
    return numpy_helper.from_array(bias.astype(np.float32), name)


def function(op: str, opset: int) -> onnx.FunctionProto:
    """The operator GEMM or CONV in plain ONNX, for runtimes that do not know it; `opset` is the file's own."""
    body = [*_dense_weight()]
    if op == GEMM:
        body += [
            helper.make_node("Transpose", ["weight"], ["turned"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", "turned"], ["product"]),
            helper.make_node("Add", ["product", "bias"], ["y"]),
        ]
    else:
        body += [
            *_constants(taps=[2, 3]),
            helper.make_node("Unsqueeze", ["weight", "taps"], ["kernel"]),
            helper.make_node("Conv", ["x", "kernel", "bias"], ["y"], kernel_shape=[1, 1]),
        ]
    return helper.make_function(DOMAIN, op, INPUTS, ["y"], body, [helper.make_opsetid("", opset)], ATTRIBUTES)


def _dense_weight() -> list[onnx.NodeProto]:
    """Nodes that make `weight` (rows, columns) of the streams: each value is added at row · width + column.

    One row and one column more than there are take what steps without a weight write, which is 0.
    """
    node = helper.make_node
    return [
        *_constants(zero=0, one=1, first=[0], second=[1], whole=[-1], origin=[0, 0], steps_at=[2], blocks_at=[1, 2, 3]),
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


def _constants(**values: int | Sequence[int]) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(value, np.int64)))
        for name, value in values.items()
    ]


def _attribute(name: str) -> onnx.NodeProto:
    """An attribute of the operator as a value of that name."""
    made = helper.make_node("Constant", [], [name])
    made.attribute.add(name="value_int", ref_attr_name=name, type=onnx.AttributeProto.INT)
    return made
