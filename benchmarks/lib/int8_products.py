"""One int8 product as ONNX models of one node, on our operators and on those of ONNX Runtime and OpenVINO.

All read a u8 tensor x (1, tokens, columns), except DynamicQuantizeMatMul and OpenVINO's product with a float32 result:
these quantise a float32 x. All add a bias of each output channel, except QLinearMatMul, which cannot. Results y are u8
or float32.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lib.nearest_int8 import rounded
from mpcompile.ir.pattern import NM
from mpcompile.passes.nm_mask.selection import nm_mask
from mpcompile.runtimes.native import int8_ops
from mpcompile.runtimes.native.custom_op import DOMAIN, VERSION
from mpcompile.runtimes.native.int8_ops import U8Quantization

OPSET = 21  # u8 and s8 in DequantizeLinear with `axis`
CONTRIB = "com.microsoft"
X = U8Quantization(1 / 40, 120)
TYPES: Mapping[str, "TensorProto.DataType"] = MappingProxyType({"u8": TensorProto.UINT8, "f32": TensorProto.FLOAT})


@dataclass(frozen=True)
class Product:
    """x · weight · scale + bias, with u8 activations x and s8 weights.

    Attributes:
        weight: integers (columns, rows).
        scale, bias: of each output channel (rows,).
        y: scale and zero point of the result where it is u8.
    """

    weight: NDArray[np.int8]
    scale: NDArray[np.float32]
    bias: NDArray[np.float32]
    y: U8Quantization

    def floats(self, x: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Returns the float result (…, rows), computed with exact integers."""
        sums = (x.astype(np.float64) - X.zero) @ self.weight.astype(np.float64)
        return sums * (X.scale * self.scale.astype(np.float64)) + self.bias


def random_product(rows: int, columns: int, pattern: NM | None, rng: np.random.Generator, saturating: bool) -> Product:
    """Returns a product with random weights, masked by magnitude; None means dense.

    With `saturating`, no 16-bit lane saturates: the weights fulfil the lane rule of their mask.
    """
    weight = rng.standard_normal((rows, columns), dtype=np.float32)
    if pattern is not None:
        weight *= nm_mask(torch.from_numpy(np.abs(weight)), pattern).numpy()
    integers, scale = rounded(np.ascontiguousarray(weight.T), saturating)
    spread = np.sqrt((weight.astype(np.float64) ** 2).sum(1).mean()) * X.scale * 255 / np.sqrt(12)
    bias = rng.standard_normal(rows, dtype=np.float32)
    return Product(integers, scale, bias, U8Quantization(float(np.float32(6 * spread / 255)), 128))


def native(product: Product, kind: str) -> onnx.ModelProto:
    """Returns the product on our operator. `kind` is "u8 → u8" or "u8 → f32"."""
    quantises = kind == "u8 → u8"
    op = int8_ops.gemm_name(None, False, quantises)
    attributes: dict[str, Any] = {"x_scale": X.scale, "x_zero": X.zero}
    attributes |= {"y_scale": product.y.scale, "y_zero": product.y.zero} if quantises else {}
    node = helper.make_node(op, ["x", "w", "s", "b"], ["y"], domain=DOMAIN, **attributes)
    stored: dict[str, NDArray[Any]] = {"w": product.weight, "s": product.scale, "b": product.bias}
    return _model([node], kind, stored, {DOMAIN: VERSION}, [int8_ops.function(op, OPSET)])


def qlinear_matmul(product: Product) -> onnx.ModelProto:
    """Returns the product as QLinearMatMul, u8 → u8, without the bias."""
    inputs = ["x", "x_scale", "x_zero", "w", "s", "w_zero", "y_scale", "y_zero"]
    return _model([helper.make_node("QLinearMatMul", inputs, ["y"])], "u8 → u8", _stored(product))


def qgemm(product: Product) -> onnx.ModelProto:
    """Returns the product as ONNX Runtime's QGemm, u8 → u8, with an int32 bias; it takes matrices."""
    inputs = ["x2", "x_scale", "x_zero", "w", "s", "w_zero", "b32", "y_scale", "y_zero"]
    bias = np.round(product.bias / (X.scale * product.scale)).astype(np.int32)
    columns, rows = product.weight.shape
    shapes = {"flat": np.array([-1, columns]), "full": np.array([1, -1, rows])}
    nodes = [
        helper.make_node("Reshape", ["x", "flat"], ["x2"]),
        helper.make_node("QGemm", inputs, ["y2"], domain=CONTRIB),
        helper.make_node("Reshape", ["y2", "full"], ["y"]),
    ]
    return _model(nodes, "u8 → u8", _stored(product) | {"b32": bias} | shapes, {CONTRIB: 1})


def matmul_integer_to_float(product: Product) -> onnx.ModelProto:
    """Returns the product as ONNX Runtime's MatMulIntegerToFloat, u8 → f32.

    ONNX Runtime makes this operator of DequantizeLinear and MatMul, and of MatMulInteger, Cast and Mul.
    """
    inputs = ["x", "w", "x_scale", "s", "x_zero", "w_zero", "b"]
    node = helper.make_node("MatMulIntegerToFloat", inputs, ["y"], domain=CONTRIB)
    return _model([node], "u8 → f32", _stored(product), {CONTRIB: 1})


def dynamic_quantize_matmul(product: Product) -> onnx.ModelProto:
    """Returns the product as ONNX Runtime's DynamicQuantizeMatMul, f32 → f32: it also quantises its input.

    ONNX Runtime makes this operator of what quantize_dynamic writes.
    """
    node = helper.make_node("DynamicQuantizeMatMul", ["x", "w", "s", "w_zero", "b"], ["y"], domain=CONTRIB)
    return _model([node], "f32 → f32", _stored(product), {CONTRIB: 1})


def standard(product: Product, kind: str) -> onnx.ModelProto:
    """Returns the product in standard operators, for OpenVINO: QuantizeLinear and DequantizeLinear around MatMul.

    `kind` is "u8 → u8" or "f32 → f32". OpenVINO would multiply "u8 → f32" in float32.
    """
    quantise = helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["x8"])
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "x_scale", "x_zero"], ["xf"]),
        helper.make_node("DequantizeLinear", ["w", "s", "w_zero"], ["wf"], axis=1),
        helper.make_node("MatMul", ["xf", "wf"], ["xw"]),
        helper.make_node("Add", ["xw", "b"], ["sum"]),
    ]
    if kind == "u8 → u8":
        nodes.append(helper.make_node("QuantizeLinear", ["sum", "y_scale", "y_zero"], ["y"]))
    else:
        nodes[0].input[0], nodes[-1].output[0] = "x8", "y"
        nodes.insert(0, quantise)
    return _model(nodes, kind, _stored(product))


def _stored(product: Product) -> dict[str, NDArray[Any]]:
    """Returns the constants of a product by the names that the nodes use."""
    return {
        "w": product.weight,
        "s": product.scale,
        "w_zero": np.zeros(len(product.scale), np.int8),
        "b": product.bias,
        "x_scale": np.array(X.scale, np.float32),
        "x_zero": np.array(X.zero, np.uint8),
        "y_scale": np.array(product.y.scale, np.float32),
        "y_zero": np.array(product.y.zero, np.uint8),
    }


def _model(
    nodes: Sequence[onnx.NodeProto],
    kind: str,
    stored: Mapping[str, NDArray[Any]],
    domains: Mapping[str, int] = MappingProxyType({}),
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    """Returns a model x -> y with the constants that its nodes read; the number of tokens is free."""
    columns, rows = stored["w"].shape
    x, y = (TYPES[side] for side in kind.split(" → "))
    read = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes, "product",
        [helper.make_tensor_value_info("x", x, [1, "tokens", columns])],
        [helper.make_tensor_value_info("y", y, [1, "tokens", rows])],
        [numpy_helper.from_array(array, name) for name, array in stored.items() if name in read],
    )  # fmt: skip
    opsets = [helper.make_opsetid(*entry) for entry in ({"": OPSET} | dict(domains)).items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)
