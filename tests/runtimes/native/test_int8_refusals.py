"""Files that nearly have the form of an 8-bit product: what the native operators cannot compute stays as it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from int8_models import Graph, native_operators, rewritten, run
from native_models import built_library
from onnx import TensorProto, helper, numpy_helper

COLUMNS = ROWS = 16
TOKENS = ROWS  # so that a bias of one value per token has as many as one per channel
Spoil = Callable[[onnx.ModelProto], None]


@pytest.fixture(scope="session")
def library() -> Path:
    return built_library()


def node(file: onnx.ModelProto, op: str, index: int = 0) -> onnx.NodeProto:
    found: list[onnx.NodeProto] = [node for node in file.graph.node if node.op_type == op]
    return found[index]


def store(file: onnx.ModelProto, name: str, array: Any) -> None:
    """Replaces an initializer, or adds one."""
    kept = [tensor for tensor in file.graph.initializer if tensor.name != name]
    del file.graph.initializer[:]
    file.graph.initializer.extend([*kept, numpy_helper.from_array(np.asarray(array), name)])


def stored(file: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(tensor for tensor in file.graph.initializer if tensor.name == name))


def blocked_weight(columns: int, axis: int) -> Spoil:
    """A scale for each block of so many channels; its size is that of one per output channel."""

    def spoil(file: onnx.ModelProto) -> None:
        weight = node(file, "DequantizeLinear", 1)
        del weight.attribute[:]
        weight.attribute.extend([helper.make_attribute("axis", axis), helper.make_attribute("block_size", columns)])
        shape = (1, ROWS) if axis == 0 else (COLUMNS, 1)
        store(file, weight.input[1], np.linspace(0.005, 0.02, 16, dtype=np.float32).reshape(shape))
        del weight.input[2:]

    return spoil


def scale_of_input_channels(file: onnx.ModelProto) -> None:
    node(file, "DequantizeLinear", 1).attribute[0].i = 0


def zero_points(file: onnx.ModelProto) -> None:
    weight = node(file, "DequantizeLinear", 1)
    del weight.input[2:]
    store(file, "zeros", np.arange(ROWS, dtype=np.int8))
    weight.input.append("zeros")


def given_weight(file: onnx.ModelProto) -> None:
    """Whoever runs the file may replace the weight."""
    name = node(file, "DequantizeLinear", 1).input[0]
    file.graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT8, (COLUMNS, ROWS)))


def signed_activations(file: onnx.ModelProto) -> None:
    store(file, "zero", np.int8(5))


def halves(file: onnx.ModelProto) -> None:
    """The whole file in float16."""
    for tensor in list(file.graph.initializer):
        if tensor.data_type == TensorProto.FLOAT:
            store(file, tensor.name, numpy_helper.to_array(tensor).astype(np.float16))
    file.graph.node.insert(0, helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16))
    node(file, "QuantizeLinear").input[0] = "half"
    file.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16


def tiny_scale(file: onnx.ModelProto) -> None:
    """Its inverse is infinite in float32."""
    store(file, "scale", np.float32(1e-40))


def factor(name: str, value: float) -> Spoil:
    def spoil(file: onnx.ModelProto) -> None:
        node(file, "Gemm").attribute.append(helper.make_attribute(name, value))

    return spoil


def bias_of_tokens(file: onnx.ModelProto) -> None:
    store(file, "column", np.linspace(-3, 3, TOKENS, dtype=np.float32)[:, None])
    node(file, "Gemm").input[2] = "column"


def computed_bias(file: onnx.ModelProto) -> None:
    node(file, "Gemm").input[2] = "bias"
    file.graph.node.insert(0, helper.make_node("ReduceMean", ["x"], ["bias"], keepdims=0))


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        ("matmul", blocked_weight(COLUMNS, 0)),
        ("matmul", blocked_weight(ROWS, 1)),
        ("matmul", scale_of_input_channels),
        ("matmul", zero_points),
        ("matmul", given_weight),
        ("matmul", signed_activations),
        ("matmul", halves),
        ("matmul", tiny_scale),
        ("gemm", factor("alpha", 0.5)),
        ("gemm", factor("beta", 0.5)),
        ("gemm", factor("transA", 1)),
        ("gemm", bias_of_tokens),
        ("gemm", computed_bias),
    ],
)
def test_other_products_are_left(library: Path, kind: str, spoil: Spoil) -> None:
    graph = Graph(0)
    graph.output(graph.product(graph.dequantize(graph.quantize("x")), COLUMNS, ROWS, kind))
    file = graph.file((TOKENS, COLUMNS))
    assert native_operators(rewritten(file, random_input()))  # as it was
    file.opset_import[0].version = 21  # of scales for blocks
    spoil(file)
    assert not native_operators(rewritten(file, random_input()))


def random_input() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((TOKENS, COLUMNS)).astype(np.float32)


@pytest.mark.parametrize("bias_scale", [(1,), (ROWS,)])
@pytest.mark.parametrize("kind", ["gemm", "gemm transposed"])
def test_a_bias_in_32_bits_is_taken_over(library: Path, kind: str, bias_scale: tuple[int]) -> None:
    graph = Graph(0)
    graph.output(graph.product(graph.dequantize(graph.quantize("x")), COLUMNS, ROWS, kind))
    file = graph.file((TOKENS, COLUMNS))
    name = node(file, "DequantizeLinear", 2).input[1]
    store(file, name, stored(file, name)[: bias_scale[0]])
    if bias_scale == (1,):
        store(file, name, np.float32(2e-4))
    changed = rewritten(file, random_input())
    assert set(native_operators(changed)) == {"NMGemmInt8"}
    wanted = run(file, random_input())[0]
    # Integers are exact; float32 rounds sums of about 10.
    np.testing.assert_allclose(run(changed, random_input(), library, as_written=False)[0], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("part", [1, 2])
@pytest.mark.parametrize("shape", [(1,), (), (1, COLUMNS)])
def test_a_norm_with_another_shape_of_parameters_is_left(library: Path, part: int, shape: tuple[int, ...]) -> None:
    graph = Graph(0)
    normed = graph.norm("x", COLUMNS)
    graph.output(graph.product(graph.dequantize(graph.quantize(normed)), COLUMNS, ROWS, "matmul"))
    file = graph.file((TOKENS, COLUMNS))
    store(file, node(file, "LayerNormalization").input[part], np.full(shape, 0.7, np.float32))
    changed = rewritten(file, random_input())
    assert set(native_operators(changed)) == {"NMGemmInt8"}
    np.testing.assert_allclose(
        run(changed, random_input(), library, as_written=False)[0], run(file, random_input())[0], rtol=0, atol=1e-5
    )


def test_a_residual_that_is_only_as_large_by_chance_is_not_added(library: Path) -> None:
    """A tensor of one token per image is broadcast, also if the batch of the run has as many images as 1."""
    graph = Graph(0)
    inner = graph.op("Neg", ["x"])
    y = graph.product(graph.dequantize(graph.quantize(inner)), COLUMNS, ROWS, "matmul")
    graph.output(graph.op("Add", [y, graph.op("ReduceMean", [inner, graph.ints(0)], keepdims=1)]))
    file = graph.file(("batch", 3, COLUMNS))
    x = np.random.default_rng(0).standard_normal((1, 3, COLUMNS)).astype(np.float32)
    changed = rewritten(file, x)
    assert set(native_operators(changed)) == {"NMGemmInt8"}
    more = np.random.default_rng(1).standard_normal((4, 3, COLUMNS)).astype(np.float32)
    np.testing.assert_allclose(run(changed, more, library, as_written=False)[0], run(file, more)[0], rtol=0, atol=1e-5)


def test_products_of_the_same_name_are_left() -> None:
    graph = Graph(0)
    inner = graph.dequantize(graph.quantize("x"))
    for _ in range(2):
        graph.output(graph.product(inner, COLUMNS, ROWS, "matmul"))
    file = graph.file((TOKENS, COLUMNS))
    for product in file.graph.node:
        if product.op_type == "MatMul":
            product.name = "same"
    assert not native_operators(rewritten(file, random_input()))


def test_a_branch_does_not_take_part(library: Path) -> None:
    """A QuantizeLinear inside an If reads the product, so the product itself must stay float32."""
    graph = Graph(0)
    y = graph.product(graph.dequantize(graph.quantize("x")), COLUMNS, ROWS, "matmul")
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node(op, [y, *inputs], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.UINT8, None)],
        )
        for name, op, inputs in (("then", "QuantizeLinear", ("scale", "zero")), ("else", "Cast", ()))
    }
    branches["else_branch"].node[0].attribute.append(helper.make_attribute("to", TensorProto.UINT8))
    branches["else_branch"].node[0].input[0] = "x"
    graph.output(graph.op("If", [graph.store("yes", np.bool_(True))], **branches), TensorProto.UINT8)
    file = graph.file((TOKENS, COLUMNS))
    changed = rewritten(file, random_input())
    assert set(native_operators(changed)) == {"NMGemmInt8"}
    wanted = run(file, random_input())[0].astype(int)
    assert np.abs(run(changed, random_input(), library, as_written=False)[0] - wanted).max() <= 1  # at ties
