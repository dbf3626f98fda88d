"""The int8 convolutions in an ONNX file: their nodes, and their fallbacks as ONNX functions.

All tensors have the channels last, and are u8. The weight is s8 (rows, channels, height, width), as a Conv has it.

    NMConvInt8      x, weight, scale and bias (rows) -> u8, clipped between the integers `low` and `high`
    NMConvInt8Add   the same, but the product is quantised, `residual` (u8) is added, and the sum is quantised
    MaxPoolInt8     x -> u8, the largest of each window

A rectifier before the result needs no operator of its own: quantisation is monotone, so clipping the number and then
quantising it is the same as clipping the integer.
"""

from collections.abc import Sequence

import onnx
from onnx import AttributeProto, TensorProto, helper

from mpcompile.runtimes.native.custom_op import DOMAIN
from mpcompile.runtimes.native.int8_ops import attribute, parameters

CONV = "NMConvInt8"
CONV_ADD = f"{CONV}Add"
POOL = "MaxPoolInt8"
OPERATORS = (CONV, CONV_ADD, POOL)
TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)  # the order of axes of a Transpose to and from channels last
WINDOW = ("strides", "pads", "dilations")


def function(op: str, opset: int) -> onnx.FunctionProto:
    """Returns the fallback of one of OPERATORS in standard operators of `opset`, the opset of the file."""
    inputs, attributes, body = (["x"], [*WINDOW, "kernel_shape"], _pool()) if op == POOL else _conv(op == CONV_ADD)
    return helper.make_function(DOMAIN, op, inputs, ["y"], body, [helper.make_opsetid("", opset)], attributes)


def _pool() -> list[onnx.NodeProto]:
    node = helper.make_node
    return [
        node("Transpose", ["x"], ["first"], perm=TO_FIRST),
        _windowed("MaxPool", ["first"], "pooled", (*WINDOW, "kernel_shape")),
        node("Transpose", ["pooled"], ["y"], perm=TO_LAST),
    ]


def _windowed(op: str, inputs: Sequence[str], output: str, attributes: Sequence[str]) -> onnx.NodeProto:
    """Returns a node with attributes of integers that are those of the function."""
    made = helper.make_node(op, inputs, [output])
    for name in attributes:
        made.attribute.add(name=name, ref_attr_name=name, type=AttributeProto.INTS)
    return made


def _conv(adds: bool) -> tuple[list[str], list[str], list[onnx.NodeProto]]:
    node = helper.make_node
    body = [
        *_dequantised("x", "inputs"),
        node("DequantizeLinear", ["weight", "scale"], ["weights"], axis=0),
        _windowed("Conv", ["inputs", "weights", "bias"], "product", WINDOW),
    ]
    if adds:
        body += [
            *parameters("branch"),
            node("QuantizeLinear", ["product", "branch_scale", "branch_zero"], ["branch_u8"]),
            node("DequantizeLinear", ["branch_u8", "branch_scale", "branch_zero"], ["branch"]),
            *_dequantised("residual", "added"),
            node("Add", ["branch", "added"], ["result"]),
        ]
    body += [
        *parameters("y"),
        node("QuantizeLinear", ["result" if adds else "product", "y_scale", "y_zero"], ["integers"]),
    ]
    for name in ("low", "high"):
        body += [attribute(name, f"{name}_value"), node("Cast", [f"{name}_value"], [name], to=TensorProto.UINT8)]
    body += [
        node("Clip", ["integers", "low", "high"], ["clipped"]),
        node("Transpose", ["clipped"], ["y"], perm=TO_LAST),
    ]
    tensors = ("x", "y", *(("branch", "residual") if adds else ()))
    attributes = [*WINDOW, "low", "high", *(f"{tensor}_{part}" for tensor in tensors for part in ("scale", "zero"))]
    return ["x", "weight", "scale", "bias", *(["residual"] if adds else [])], attributes, body


def _dequantised(tensor: str, result: str) -> Sequence[onnx.NodeProto]:
    """Returns nodes that dequantise an input and bring its channels to the second axis."""
    node = helper.make_node
    return [
        *parameters(tensor),
        node("Transpose", [tensor], [f"{tensor}_first"], perm=TO_FIRST),
        node("DequantizeLinear", [f"{tensor}_first", f"{tensor}_scale", f"{tensor}_zero"], [result]),
    ]
