"""TensorRT's requirements on QuantizeLinear and DequantizeLinear as rules with their sources, and checks of a graph.

Two questions: which of these nodes TensorRT refuses (`quantize_refusal`, `dequantize_refusal`), and whether a product
with an 8-bit weight reads 8 bits and returns 8 bits (`ends_of`), without which no sparse int8 kernel is chosen.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from mpcompile.export.mask_check import file_weights
from mpcompile.measure.layer_verdict import Rule

QUANTIZED_TYPES = "TensorRT operator reference, IQuantizeLayer and IDequantizeLayer"
OBSERVED_IN = "TensorRT for RTX 1.7.1, its parser and compiler on a CPU"

ZERO_POINT = Rule("zero-point", "zero points are 0: quantization is symmetric", QUANTIZED_TYPES, "documented")
SIGNED = Rule("signed", "8-bit activations are int8 or FP8, not uint8", QUANTIZED_TYPES, "documented")
SCALE = Rule("scale", "scales are positive constants", QUANTIZED_TYPES, "documented")
INTEGERS = Rule("integers", "DequantizeLinear reads 8 bits or fewer, so biases stay in float", OBSERVED_IN, "observed")
PER_TENSOR = Rule("per-tensor", "an activation has one scale for the tensor", QUANTIZED_TYPES, "documented")
QUANTIZATION_RULES = (ZERO_POINT, SIGNED, SCALE, INTEGERS, PER_TENSOR)

INT8_INPUT = Rule("int8-input", "a product runs in int8 if its activation is int8, too", QUANTIZED_TYPES, "documented")
INT8_OUTPUT = Rule(
    "int8-output",
    "a sparse int8 kernel is chosen only if the output is int8, too",
    "NVIDIA ModelOpt, its sparse int8 example with TensorRT 10.14",
    "observed",
)
FP8 = Rule(
    "fp8", "the guide does not mention sparse FP8", "TensorRT developer guide, structured sparsity", "documented"
)
FP8_CAPABILITY = Rule("fp8-capability", "FP8 needs compute capability 8.9 or newer", OBSERVED_IN, "observed")
END_RULES = (INT8_INPUT, INT8_OUTPUT, FP8)

EIGHT_BITS = (TensorProto.INT8, TensorProto.FLOAT8E4M3FN)
UNSIGNED = (TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT4)
LAYOUT_STEPS = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity", "MaxPool")
# Operators of one activation that TensorRT fuses with the product before them.
FUSED_STEPS = frozenset({
    "Relu", "Clip", "Gelu", "Sigmoid", "HardSigmoid", "HardSwish", "LeakyRelu", "Elu", "Tanh", "Erf", "Softplus",
    "Identity", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Swish", "Mish",
})  # fmt: skip

Constants = Mapping[str, onnx.TensorProto]
Broken = tuple[str, Rule] | None


def quantize_refusal(node: onnx.NodeProto, constants: Constants, types: Mapping[str, int]) -> Broken:
    """What is wrong with a QuantizeLinear, or None."""
    if (broken := _broken_scale(node, constants)) is not None:
        return broken
    count = int(np.prod(constants[node.input[1]].dims))
    return (f"it has {count} scales", PER_TENSOR) if count > 1 else _broken_zero_point(node, constants)


def dequantize_refusal(node: onnx.NodeProto, constants: Constants, types: Mapping[str, int]) -> Broken:
    """What is wrong with a DequantizeLinear, or None."""
    if types.get(node.input[0]) == TensorProto.INT32:
        return "it reads int32, as of a bias", INTEGERS
    return _broken_scale(node, constants) or _broken_zero_point(node, constants)


def _broken_scale(node: onnx.NodeProto, constants: Constants) -> Broken:
    if node.input[1] not in constants:
        return f"its scale, {node.input[1]}, is not a constant", SCALE
    positive = (numpy_helper.to_array(constants[node.input[1]]) > 0).all()
    return None if positive else ("a scale is 0, negative or not a number", SCALE)


def _broken_zero_point(node: onnx.NodeProto, constants: Constants) -> Broken:
    if len(node.input) < 3 or not node.input[2]:
        unsigned = node.op_type == "QuantizeLinear" and not any(a.name == "output_dtype" for a in node.attribute)
        return ("its result is uint8", SIGNED) if unsigned else None
    if node.input[2] not in constants:
        return f"its zero point, {node.input[2]}, is not a constant", ZERO_POINT
    stored = constants[node.input[2]]
    if (numpy_helper.to_array(stored) != 0).any():
        return "its zero point is not 0", ZERO_POINT
    return ("its type is uint8", SIGNED) if stored.data_type in UNSIGNED else None


@dataclass(frozen=True, slots=True)
class Ends:
    """What a product reads and what reads its result: each None if it is 8 bits, else the operator in words."""

    reads: str | None
    returns: str | None


def ends_of(file: onnx.ModelProto) -> dict[str, Ends]:
    """The ends of each Conv, Gemm and MatMul node with one constant operand, by node name.

    A bias and an activation function after a product are fused with it, so the result counts from behind them.
    """
    constants = {tensor.name for tensor in file.graph.initializer}
    makers = {output: node for node in file.graph.node for output in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in file.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in file.graph.output}
    found = {}
    for node in file.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            reads = _source(node.input[0], makers)
            found[node.name] = Ends(reads, _end(node, readers, outputs, constants))
    return found


def eight_bit_note(file: onnx.ModelProto) -> str | None:
    """A sentence with the number of products with an 8-bit weight that read and return 8 bits; None without any."""
    ends = ends_of(file)
    found = [ends[weight.node] for weight in file_weights(file) if weight.values.dtype.itemsize == 1]
    if not found:
        return None
    whole = sum(end.reads is None and end.returns is None for end in found)
    return f"{whole} of {len(found)} products with 8-bit weights read 8 bits and return 8 bits"


def _source(name: str, makers: Mapping[str, onnx.NodeProto]) -> str | None:
    """None if a value is behind DequantizeLinear, else what makes it."""
    maker = makers.get(name)
    while maker is not None and maker.op_type in LAYOUT_STEPS:
        name = maker.input[0]
        maker = makers.get(name)
    if maker is None:
        return f"{name}, which is not quantised"
    return None if maker.op_type == "DequantizeLinear" else f"{maker.op_type} {maker.name}"


def _end(
    node: onnx.NodeProto, readers: Mapping[str, list[onnx.NodeProto]], outputs: set[str], constants: set[str]
) -> str | None:
    """None if QuantizeLinear alone reads the result of a node, behind fused operators; else what reads it."""
    while True:
        [result, *_] = node.output
        if result in outputs:
            return "it is an output of the model"
        following = readers.get(result, [])
        others = [reader for reader in following if reader.op_type != "QuantizeLinear"]
        if not others:
            return None if following else "nothing reads it"
        if len(following) > 1 or not _is_fused(others[0], result, constants):
            return f"{others[0].op_type} {others[0].name} reads it"
        node = others[0]


def _is_fused(node: onnx.NodeProto, result: str, constants: set[str]) -> bool:
    """Whether TensorRT fuses a node with the product before it: an activation function, or the Add of a bias."""
    if node.op_type == "Add":
        return any(name in constants for name in node.input if name != result)
    return node.op_type in FUSED_STEPS
