"""Writes biases of int8 layers as 32-bit integers behind DequantizeLinear.

Runtimes for CPUs add the bias to the integer sums of products. The scale of a sum is input scale × weight scale, and so
is the scale of the bias. That is done for u8 activations only: TensorRT, for which activations are s8 or fp8, adds
biases in floating point.

A MatMul has no bias; an Add after it adds the bias. ONNX Runtime 1.32 turns the two into a Gemm if the MatMul reads a
matrix, or a tensor whose dimensions are all fixed, as in a file with a fixed batch. That happens before it looks for
8-bit products, and a Gemm with a float bias and a float output runs in float32. The bias is then stored as integers. In
all other cases the MatMul runs in 8 bits and the Add in float32. The bias stays in float32 there, since ONNX Runtime
would dequantise the integers in every run.

A channel whose weights are nearly 0 may have a bias of more than 2^31 steps. ONNX Runtime 1.32 quantises a float bias
by itself, and the integers wrap around. Such a channel therefore gets a larger weight scale, and its weights are
rounded once more. For n weights of the channel and u8 inputs, the output changes by at most n · 255 / 2^31 of the bias,
1e-4 for a thousand weights, far less than a step of an 8-bit output that holds the bias.
"""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

log = logging.getLogger(__name__)

LARGEST_BIAS = 2**30  # leaves as much room again for the sum of products
# Operators between the DequantizeLinear of an activation and a layer that keep its numbers.
LAYOUT_STEPS = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity")


@dataclass(frozen=True, slots=True)
class _Bias:
    """A constant bias with one number for each output channel, and the node that adds it.

    Attributes:
        value: the initializer.
        node: the Conv or Gemm itself, or the Add after a MatMul.
        position: of the bias among the inputs of `node`.
    """

    value: ir.Value
    node: ir.Node
    position: int

    @property
    def numbers(self) -> NDArray[np.float64]:
        """The bias of each output channel (out,)."""
        return _array(self.value).astype(np.float64)


def with_room_for_biases(
    nodes: Sequence[ir.Node], numbers: NDArray[np.float64], scale: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The integers (out, …) and scales (out,) of a weight, with the scales of rows raised whose bias would not fit.

    `nodes` are all nodes that multiply by the weight.
    """
    least = np.zeros_like(scale)
    for node in nodes:
        read, bias = _input_scale(node, (ir.DataType.UINT8, ir.DataType.INT8)), _bias(node)
        if read is not None and bias is not None and len(bias.numbers) == len(scale):
            least = np.maximum(least, np.abs(bias.numbers) / (read * LARGEST_BIAS))
    raised = scale < least
    if raised.any():
        log.debug("%s: the scales of %d output channels are raised to hold their biases", nodes[0].name, raised.sum())
    ratio = np.where(raised, scale / np.where(raised, least, 1), 1).reshape(-1, *[1] * (numbers.ndim - 1))
    return np.where(ratio < 1, np.rint(numbers * ratio), numbers), np.maximum(scale, least)


def quantize_bias(graph: ir.Graph, node: ir.Node) -> None:
    """Replaces the bias of a Conv, Gemm or MatMul that reads u8, in place."""
    read, bias = _input_scale(node, (ir.DataType.UINT8,)), _bias(node)
    if read is None or bias is None:
        return
    dequantise = node.inputs[1].producer() if node.inputs[1] is not None else None
    assert dequantise is not None
    scale = read * _array(dequantise.inputs[1]).astype(np.float64)
    integers = np.rint(bias.numbers / scale)
    stored = new_initializer(graph, f"{node.name}.bias", integers.astype(np.int32))
    inputs = [stored, new_initializer(graph, f"{node.name}.bias.scale", scale.astype(np.float32))]
    step = ir.node("DequantizeLinear", inputs, {"axis": 0}, name=f"{node.name}_bias")
    step.outputs[0].name = f"{node.name}.bias.dequantized"
    graph.insert_before(bias.node, step)
    bias.node.replace_input_with(bias.position, step.outputs[0])
    if not bias.value.uses() and bias.value.name is not None:
        del graph.initializers[bias.value.name]
        stored.name = bias.value.name


def new_initializer(graph: ir.Graph, name: str, values: NDArray[Any]) -> ir.Value:
    """An initializer added to the graph."""
    tensor = ir.tensor(values, name=name)
    value = ir.Value(name=name, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _bias(node: ir.Node) -> _Bias | None:
    """The bias that ONNX Runtime adds in the operator of a node; None without one, or if it is scaled."""
    if node.op_type == "MatMul":
        return _bias_after(node)
    if node.op_type not in ("Conv", "Gemm") or len(node.inputs) < 3 or node.attributes.get_float("beta", 1.0) != 1:
        return None
    value = node.inputs[2]
    return _Bias(value, node, 2) if value is not None and _is_vector(value) else None


def _bias_after(node: ir.Node) -> _Bias | None:
    """The bias that the Add after a MatMul adds, if ONNX Runtime turns both into a Gemm."""
    result, shape = node.outputs[0], node.outputs[0].shape
    if shape is None or not (len(shape) == 2 or shape.is_static()):
        return None
    if len(result.uses()) != 1 or result.is_graph_output():
        return None
    [(add, position)] = result.uses()
    value = add.inputs[1 - position] if add.op_type == "Add" else None
    if value is None or not _is_vector(value) or _array(value).size != shape[-1]:
        return None
    return _Bias(value, add, 1 - position)


def _is_vector(value: ir.Value) -> bool:
    """Whether a value is an initializer of one axis."""
    return value.producer() is None and value.const_value is not None and _array(value).ndim == 1


def _input_scale(node: ir.Node, kinds: Collection[ir.DataType]) -> float | None:
    """The scale of the activation that a node reads; None if that is not quantised to one of these types."""
    value = node.inputs[0]
    step = value.producer() if value is not None else None
    while step is not None and step.op_type in LAYOUT_STEPS:
        value = step.inputs[0]
        step = value.producer() if value is not None else None
    if step is None or step.op_type != "DequantizeLinear" or len(step.inputs) < 3:
        return None
    scale, zero_point = step.inputs[1], step.inputs[2]
    if scale is None or zero_point is None or scale.const_value is None or zero_point.const_value is None:
        return None
    return float(_array(scale)) if zero_point.const_value.dtype in kinds else None


def _array(value: ir.Value | None) -> NDArray[Any]:
    """The numbers of an initializer."""
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()
