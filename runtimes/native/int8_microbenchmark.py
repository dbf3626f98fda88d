"""Times one 8-bit product or convolution as a model of one node: on ONNX Runtime's kernel and on the native one."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mpcompile.measure.timing import Speedup
from mpcompile.runtimes.native import int8_conv_ops, int8_ops
from mpcompile.runtimes.native.custom_op import DOMAIN, VERSION
from mpcompile.runtimes.native.int8_conv_ops import TO_FIRST, TO_LAST
from mpcompile.runtimes.native.int8_conv_rewrite import attributes
from mpcompile.runtimes.native.int8_convolutions import Int8Convolution
from mpcompile.runtimes.native.int8_products import Int8Product
from mpcompile.runtimes.native.microbenchmark import OneNode, compared

OPSET = 21
BLOCK, MOST_KEPT = 16, 8  # the kernel skips the zeros of a weight that keeps at most 8 of each 16 input channels


def by_columns(each: Int8Product | Int8Convolution) -> NDArray[np.int8]:
    """Returns the weight (columns, rows) in blocks of BLOCK as the kernel multiplies it, which may pad each tap."""
    if isinstance(each, Int8Product):
        return each.weight
    rows, channels = each.weight.shape[:2]
    taps = each.weight.reshape(rows, channels, -1).transpose(2, 1, 0)
    plain = np.ascontiguousarray(taps.reshape(-1, rows))
    padded = np.pad(taps, ((0, 0), (0, -channels % BLOCK), (0, 0))).reshape(-1, rows)
    return plain if skips_zeros(plain) else padded


def skips_zeros(weight: NDArray[np.int8]) -> bool:
    """Whether the native kernel skips the zeros of a weight (columns, rows)."""
    padded = np.pad(weight != 0, ((0, -len(weight) % BLOCK), (0, 0)))
    kept = padded.reshape(-1, BLOCK, weight.shape[1]).sum(1)
    return bool((kept <= MOST_KEPT).all())


def measure_product(
    product: Int8Product, x: tuple[int, ...], library: Path, threads: int | None, seconds: float
) -> tuple[Any, Any, Speedup]:
    """Returns the times of ONNX Runtime's node and of the native one for a product, and the speedup."""
    rng = np.random.default_rng(0)
    activations = rng.integers(0, 256, x, dtype=np.uint8)
    runs = []
    for model, used in ((standard_node(product), None), (native_node(product), library)):
        node = OneNode(model, used, threads)
        node.bind(activations, np.empty((*x[:-1], len(product.scale)), np.float32))
        runs.append(node)
    return compared(runs[0], runs[1], x[0], seconds)


def standard_node(product: Int8Product) -> onnx.ModelProto:
    """Returns the product in standard operators, as a model x u8 -> y float32 that ONNX Runtime runs in 8 bits."""
    node = helper.make_node
    nodes = [
        node("DequantizeLinear", ["x", "x_scale", "x_zero"], ["inputs"]),
        node("DequantizeLinear", ["weight", "scale", "zeros"], ["weights"], axis=1),
        node("MatMul", ["inputs", "weights"], ["product"]),
        node("Add", ["product", "bias"], ["y"]),
    ]
    quantization = product.x_quantization
    stored: dict[str, NDArray[Any]] = {
        "x_scale": np.array(quantization.scale, np.float32),
        "x_zero": np.array(quantization.zero, np.uint8),
        "zeros": np.zeros(len(product.scale), np.int8),
    }
    return _model(nodes, product, stored)


def native_node(product: Int8Product) -> onnx.ModelProto:
    """Returns the product as the native operator, as a model x u8 -> y float32."""
    quantization = product.x_quantization
    native = helper.make_node(
        int8_ops.GEMM, ["x", "weight", "scale", "bias"], ["y"], domain=DOMAIN,
        x_scale=quantization.scale, x_zero=quantization.zero,
    )  # fmt: skip
    model = _model([native], product, {})
    model.functions.append(int8_ops.function(int8_ops.GEMM, OPSET))
    model.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))
    return model


def measure_convolution(
    convolution: Int8Convolution, x: tuple[int, ...], library: Path, threads: int | None, seconds: float
) -> tuple[Any, Any, Speedup]:
    """Returns the times of ONNX Runtime's node and of the native one for a convolution, and the speedup.

    `x` is (images, height, width, channels). Both nodes read and return tensors with the channels last, as ONNX
    Runtime's own 8-bit convolutions do inside a file. Neither adds a residual.
    """
    activations = np.random.default_rng(0).integers(0, 256, x, dtype=np.uint8)
    (images, height, width, _), (rows, _, *kernel) = x, convolution.weight.shape
    top, left, bottom, right = convolution.pads
    sizes = (
        (size + before + after - dilation * (taps - 1) - 1) // stride + 1
        for size, before, after, dilation, taps, stride in zip(
            (height, width),
            (top, left),
            (bottom, right),
            convolution.dilations,
            kernel,
            convolution.strides,
            strict=True,
        )
    )
    y = (images, *sizes, rows)
    runs = []
    for model, used in ((standard_convolution(convolution), None), (native_convolution(convolution), library)):
        node = OneNode(model, used, threads)
        node.bind(activations, np.empty(y, np.uint8))
        runs.append(node)
    return compared(runs[0], runs[1], x[0], seconds)


def standard_convolution(convolution: Int8Convolution) -> onnx.ModelProto:
    """Returns the convolution in standard operators, as a model x u8 -> y u8 with the channels last.

    ONNX Runtime runs it in 8 bits and with the channels last, so that the Transposes cancel out.
    """
    node = helper.make_node
    nodes = [
        node("Transpose", ["x"], ["first"], perm=TO_FIRST),
        node("DequantizeLinear", ["first", "x_scale", "x_zero"], ["inputs"]),
        node("DequantizeLinear", ["weight", "scale", "zeros"], ["weights"], axis=0),
        node("DequantizeLinear", ["bias_integers", "bias_scale"], ["bias_floats"], axis=0),
        node(
            "Conv",
            ["inputs", "weights", "bias_floats"],
            ["product"],
            strides=convolution.strides,
            pads=convolution.pads,
            dilations=convolution.dilations,
        ),
        node("QuantizeLinear", ["product", "y_scale", "y_zero"], ["quantised"]),
        node("Transpose", ["quantised"], ["y"], perm=TO_LAST),
    ]
    rows, of_x, of_y = len(convolution.weight), convolution.x_quantization, convolution.y_quantization
    bias_scale = (convolution.scale * np.float32(of_x.scale)).clip(np.finfo(np.float32).tiny)
    stored: dict[str, NDArray[Any]] = {
        "x_scale": np.array(of_x.scale, np.float32),
        "x_zero": np.array(of_x.zero, np.uint8),
        "y_scale": np.array(of_y.scale, np.float32),
        "y_zero": np.array(of_y.zero, np.uint8),
        "zeros": np.zeros(rows, np.int8),
        "bias_integers": np.zeros(rows, np.int32),  # numbers do not change the time
        "bias_scale": bias_scale,
    }
    model = _model(nodes, convolution, stored)
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.UINT8
    return model


def native_convolution(convolution: Int8Convolution) -> onnx.ModelProto:
    """Returns the convolution as the native operator, as a model x u8 -> y u8 with the channels last."""
    given = attributes(replace(convolution, residual=None))
    native = helper.make_node(int8_conv_ops.CONV, ["x", "weight", "scale", "bias"], ["y"], domain=DOMAIN, **given)
    model = _model([native], convolution, {})
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.UINT8
    model.functions.append(int8_conv_ops.function(int8_conv_ops.CONV, OPSET))
    model.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))
    return model


def _model(
    nodes: Sequence[onnx.NodeProto], product: Int8Product | Int8Convolution, stored: Mapping[str, NDArray[Any]]
) -> onnx.ModelProto:
    """Returns a model x u8 -> y float32 of any shape, with the product's weight, scale and bias beside `stored`."""
    arrays = {**stored, "weight": product.weight, "scale": product.scale, "bias": product.bias}
    graph = helper.make_graph(
        list(nodes),
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
