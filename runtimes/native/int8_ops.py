"""The int8 operators in an ONNX file: their nodes, and their fallbacks as ONNX functions.

They belong to the domain `mpcompile`, as NMGemm does (custom_op.py). Where the kernel's library is not registered,
ONNX Runtime inlines the functions, which are written in standard operators: DequantizeLinear, MatMul, QuantizeLinear
and so on. A function adds and multiplies in float32 where the kernel adds integers, so results differ by rounding.

    NMGemmInt8            x u8 (…, columns), weight s8 (columns, rows), scale and bias (rows) -> float32 (…, rows)
    NMGemmInt8Add         the same plus a float32 residual (…, rows)
    NMGemmInt8…Quantize   u8 (…, rows), after Relu, Gelu, GeluTanh or nothing
    LayerNormQuantize     x float32 (…, columns), gamma and beta (columns) -> u8 (…, columns)
    Attention             q, k, v float32 (images, tokens, …) -> float32 (images, queries, heads · dim)
    …Quantize, Biased…    the same with a u8 result; with a bias that is added to the scores
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import onnx
from onnx import AttributeProto, TensorProto, helper

from mpcompile.runtimes.native.custom_op import DOMAIN

OLDEST_OPSET = 20  # of Gelu
ALL_QUERIES = 2**31 - 1  # as the number of queries: all from the first one on
GEMM, NORM, ATTENTION = "NMGemmInt8", "LayerNormQuantize", "Attention"
# The activations that a product can apply before it quantises: operator, attributes, and the part of its name.
ACTIVATIONS: Mapping[str, tuple[str, Mapping[str, str]]] = MappingProxyType(
    {"Relu": ("Relu", {}), "Gelu": ("Gelu", {"approximate": "none"}), "GeluTanh": ("Gelu", {"approximate": "tanh"})}
)


@dataclass(frozen=True, slots=True)
class U8Quantization:
    """Scale and zero point of a u8 tensor."""

    scale: float
    zero: int


def gemm_name(activation: str | None, adds: bool, quantises: bool) -> str:
    """Returns the operator of a product with this activation, a key of ACTIVATIONS, before it is quantised."""
    return f"{GEMM}{activation or ''}{'Add' if adds else ''}{'Quantize' if quantises else ''}"


def attention_name(biased: bool, quantises: bool) -> str:
    """Returns the operator of an attention."""
    return f"{'Biased' if biased else ''}{ATTENTION}{'Quantize' if quantises else ''}"


OPERATORS = (
    gemm_name(None, False, False),
    gemm_name(None, True, False),
    *(gemm_name(activation, False, True) for activation in (None, *ACTIVATIONS)),
    NORM,
    *(attention_name(biased, quantises) for biased in (False, True) for quantises in (False, True)),
)


def function(op: str, opset: int) -> onnx.FunctionProto:
    """Returns the fallback of one of OPERATORS in standard operators of `opset`, the opset of the file."""
    quantises = op.endswith("Quantize")
    if op.startswith(GEMM):
        inputs, attributes, body = _gemm(op)
    elif op == NORM:
        inputs, attributes, body = ["x", "gamma", "beta"], ["epsilon"], _norm()
    else:
        inputs, attributes, body = _attention(op.startswith("Biased"))
    if quantises:
        attributes += ["y_scale", "y_zero"]
        body += [*parameters("y"), helper.make_node("QuantizeLinear", ["result", "y_scale", "y_zero"], ["y"])]
    else:
        body[-1].output[0] = "y"
    return helper.make_function(DOMAIN, op, inputs, ["y"], body, [helper.make_opsetid("", opset)], attributes)


def _gemm(op: str) -> tuple[list[str], list[str], list[onnx.NodeProto]]:
    node = helper.make_node
    body = [
        *parameters("x"),
        node("DequantizeLinear", ["x", "x_scale", "x_zero"], ["inputs"]),
        node("DequantizeLinear", ["weight", "scale"], ["weights"], axis=1),
        node("MatMul", ["inputs", "weights"], ["product"]),
        node("Add", ["product", "bias"], ["result"]),
    ]
    inputs = ["x", "weight", "scale", "bias"]
    middle = op.removeprefix(GEMM).removesuffix("Quantize")
    if middle == "Add":
        body[-1].output[0] = "linear"
        body.append(node("Add", ["linear", "residual"], ["result"]))
        inputs.append("residual")
    elif middle:
        body[-1].output[0] = "linear"
        operator, attributes = ACTIVATIONS[middle]
        body.append(node(operator, ["linear"], ["result"], **attributes))
    return inputs, ["x_scale", "x_zero"], body


def _norm() -> list[onnx.NodeProto]:
    node = helper.make_node("LayerNormalization", ["x", "gamma", "beta"], ["result"], axis=-1)
    node.attribute.add(name="epsilon", ref_attr_name="epsilon", type=AttributeProto.FLOAT)
    return [node]


def _attention(biased: bool) -> tuple[list[str], list[str], list[onnx.NodeProto]]:
    node = helper.make_node
    body = [
        _ints("joined", [0, 0, -1]),
        _ints("tokens", [1]),
        _ints("channels", [2]),
        _ints("one", [1]),
        *(attribute(name, f"{name}_value") for name in ("heads", "dim")),
        *(node("Reshape", [f"{name}_value", "one"], [name]) for name in ("heads", "dim")),
        node("Mul", ["heads", "dim"], ["width"]),
        _ints("kept", [0, 0]),
        node("Concat", ["kept", "heads", "dim"], ["by_head"], axis=0),
        attribute("scale", "scale", is_float=True),
        *(attribute(name, f"{name}_value") for name in ("first_query", "queries")),
        *(node("Reshape", [f"{name}_value", "one"], [name]) for name in ("first_query", "queries")),
        node("Add", ["first_query", "queries"], ["end_query"]),
        node("Slice", ["q", "first_query", "end_query", "tokens"], ["q_tokens"]),
    ]
    for name, order in (("q", (0, 2, 1, 3)), ("k", (0, 2, 3, 1)), ("v", (0, 2, 1, 3))):
        body += [
            attribute(f"{name}_offset", f"{name}_value"),
            node("Reshape", [f"{name}_value", "one"], [f"{name}_start"]),
            node("Add", [f"{name}_start", "width"], [f"{name}_end"]),
            node(
                "Slice",
                [f"{name}_tokens" if name == "q" else name, f"{name}_start", f"{name}_end", "channels"],
                [f"{name}_part"],
            ),
            node("Reshape", [f"{name}_part", "by_head"], [f"{name}_split"]),
            node("Transpose", [f"{name}_split"], [f"{name}_heads"], perm=order),
        ]
    body += [
        node("MatMul", ["q_heads", "k_heads"], ["products"]),
        node("Mul", ["products", "scale"], ["scores" if not biased else "unbiased"]),
        *([node("Add", ["unbiased", "bias"], ["scores"])] if biased else []),
        node("Softmax", ["scores"], ["probabilities"], axis=-1),
        node("MatMul", ["probabilities", "v_heads"], ["mixed"]),
        node("Transpose", ["mixed"], ["turned"], perm=(0, 2, 1, 3)),
        node("Reshape", ["turned", "joined"], ["result"]),
    ]
    inputs = ["q", "k", "v", *(["bias"] if biased else [])]
    return inputs, ["heads", "dim", "q_offset", "k_offset", "v_offset", "first_query", "queries", "scale"], body


def parameters(tensor: str) -> list[onnx.NodeProto]:
    """Returns nodes that give the attributes `tensor_scale` and `tensor_zero` as values, the zero point as u8."""
    return [
        attribute(f"{tensor}_scale", f"{tensor}_scale", is_float=True),
        attribute(f"{tensor}_zero", f"{tensor}_zero_value"),
        helper.make_node("Cast", [f"{tensor}_zero_value"], [f"{tensor}_zero"], to=TensorProto.UINT8),
    ]


def attribute(name: str, value: str, *, is_float: bool = False) -> onnx.NodeProto:
    """Returns a node that gives the operator's attribute `name`, a float or an int, as a value."""
    node = helper.make_node("Constant", [], [value])
    kind = AttributeProto.FLOAT if is_float else AttributeProto.INT
    node.attribute.add(name="value_float" if is_float else "value_int", ref_attr_name=name, type=kind)
    return node


def _ints(value: str, numbers: Sequence[int]) -> onnx.NodeProto:
    tensor = helper.make_tensor(value, TensorProto.INT64, [len(numbers)], numbers)
    return helper.make_node("Constant", [], [value], value=tensor)
