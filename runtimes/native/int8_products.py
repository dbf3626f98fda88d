"""Finds the 8-bit products of a file: a MatMul or Gemm between two DequantizeLinear nodes, with the bias after it."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from jaxtyping import Float32, Int8

from mpcompile.runtimes.native.graph_reading import constant, only_reader, producer
from mpcompile.runtimes.native.int8_ops import U8Quantization

SCALES = (1e-37, 1e37)  # of u8 tensors; right_quantisation in src/ort_int8.h refuses others


@dataclass(frozen=True, slots=True)
class Int8Product:
    """A product of a u8 tensor and an s8 weight, with its bias.

    Attributes:
        name: of the node that multiplies.
        x: the u8 tensor, the result of a QuantizeLinear.
        x_quantization: its scale and zero point.
        y: the float32 result, with the bias.
        nodes: names of the tensors that the replaced nodes compute; the last is y.
        initializer: name of the stored weight.
        weight: the integers.
        scale: of each output channel.
        bias: of each output channel.
    """

    name: str
    x: str
    x_quantization: U8Quantization
    y: str
    nodes: tuple[str, ...]
    initializer: str
    weight: Int8[np.ndarray, "columns rows"]
    scale: Float32[np.ndarray, " rows"]
    bias: Float32[np.ndarray, " rows"]


def find(file: onnx.ModelProto) -> list[Int8Product]:
    """Returns the products of u8 activations by s8 weights, in file order."""
    graph = ir.from_proto(file).graph
    names = Counter(node.name for node in graph)
    return [
        product for node in graph if names[node.name] == 1 and (product := _product(node)) is not None
    ]  # a name of two nodes would not tell which one is replaced


def _product(node: ir.Node) -> Int8Product | None:
    """Returns the product that a node computes, if the native operator can."""
    if node.op_type not in ("MatMul", "Gemm") or node.domain not in ("", "ai.onnx") or not node.name:
        return None
    left, right = (producer(value, "DequantizeLinear") for value in node.inputs[:2])
    if left is None or right is None:
        return None
    weight_value = right.inputs[0]
    x_quantization, weight = scalar_quantization(left), constant(weight_value)
    scale = constant(right.inputs[1])
    u8 = left.inputs[0]
    if x_quantization is None or weight is None or weight_value is None or scale is None:
        return None
    if u8 is None or u8.is_initializer():
        return None
    if weight.dtype != np.int8 or weight.ndim != 2 or not symmetric(right):
        return None
    # A scale of two dimensions holds one for each block of input or output channels.
    if scale.dtype != np.float32 or scale.ndim > 1 or right.attributes.get_int("block_size", 0) != 0:
        return None
    axis = right.attributes.get_int("axis", 1) % 2
    if node.op_type == "Gemm":
        given = node.attributes
        if given.get_int("transA", 0) or given.get_float("alpha", 1.0) != 1 or given.get_float("beta", 1.0) != 1:
            return None
        if given.get_int("transB", 0):
            weight, axis = weight.T, 1 - axis
    rows = weight.shape[1]
    if scale.size not in (1, rows) or (scale.size > 1 and axis != 1):
        return None
    output = node.outputs[0]
    nodes: tuple[str, ...] = (str(output.name),)
    bias = np.zeros(rows, np.float32)
    if node.op_type == "Gemm":
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            stored = dequantised(node.inputs[2])
            if stored is None or stored.shape not in ((rows,), (1, rows)):
                return None
            bias = stored.reshape(-1)
    elif (added := _bias_after(output, rows)) is not None:
        add, bias = added
        nodes = (*nodes, str(add.outputs[0].name))
    return Int8Product(
        name=node.name,
        x=str(u8.name),
        x_quantization=x_quantization,
        y=nodes[-1],
        nodes=nodes,
        initializer=str(weight_value.name),
        weight=np.ascontiguousarray(weight),
        scale=np.broadcast_to(scale.astype(np.float32).reshape(-1), rows).copy(),
        bias=bias.astype(np.float32),
    )


def _bias_after(output: ir.Value, rows: int) -> tuple[ir.Node, Float32[np.ndarray, " rows"]] | None:
    """Returns the Add that is the only reader of a product and adds a constant of one value per output channel."""
    add = only_reader(output)
    if add is None or add.op_type != "Add":
        return None
    stored = dequantised(next(value for value in add.inputs if value is not output))
    return (add, stored) if stored is not None and stored.shape == (rows,) else None


def dequantised(value: ir.Value | None) -> np.ndarray | None:
    """Returns a constant in float32, also if it is stored as integers behind a DequantizeLinear."""
    stored = constant(value)
    if stored is not None:
        return stored.astype(np.float32) if stored.dtype == np.float32 else None
    node = producer(value, "DequantizeLinear")
    integers, scale = (None, None) if node is None else (constant(node.inputs[0]), constant(node.inputs[1]))
    if node is None or integers is None or scale is None or scale.dtype != np.float32 or not symmetric(node):
        return None
    if scale.size != 1 and (integers.ndim != 1 or scale.shape != integers.shape):
        return None
    return (integers.astype(np.float64) * scale.astype(np.float64)).astype(np.float32)


def symmetric(dequantise: ir.Node) -> bool:
    """Whether the zero points of a DequantizeLinear are 0 or absent."""
    if len(dequantise.inputs) < 3 or dequantise.inputs[2] is None:
        return True
    stored = constant(dequantise.inputs[2])
    return stored is not None and not stored.any()


def scalar_quantization(node: ir.Node) -> U8Quantization | None:
    """Returns scale and zero point of a QuantizeLinear or DequantizeLinear of a u8 tensor with one scale, or None.

    The float side must be float32, and the scale one that the operators take.
    """
    scale = constant(node.inputs[1])
    zero = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if scale is None or zero is None or zero.dtype != np.uint8 or scale.size != 1 or zero.size != 1:
        return None
    if scale.dtype != np.float32 or not SCALES[0] <= scale.reshape(-1)[0] <= SCALES[1]:
        return None
    return U8Quantization(float(scale.reshape(-1)[0]), int(zero.reshape(-1)[0]))
