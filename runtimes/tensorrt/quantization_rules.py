"""TensorRT's requirements on QuantizeLinear and DequantizeLinear as rules with their sources, and checks of a graph.

`quantize_refusal` and `dequantize_refusal` tell which of these nodes TensorRT refuses, END_RULES when a product with an
8-bit weight gets no sparse kernel, by what it reads and what it returns (mpcompile/export/eight_bit_ends.py).
"""

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from mpcompile.export.eight_bit_ends import ends_of
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

UNSIGNED = (TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT4)
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


def eight_bit_note(file: onnx.ModelProto) -> str | None:
    """A sentence with the number of products with an 8-bit weight that read and return 8 bits; None without any."""
    ends = ends_of(file, FUSED_STEPS)
    found = [ends[weight.node] for weight in file_weights(file) if weight.values.dtype.itemsize == 1]
    if not found:
        return None
    whole = sum(end.reads is None and end.returns is None for end in found)
    return f"{whole} of {len(found)} products with 8-bit weights read 8 bits and return 8 bits"
