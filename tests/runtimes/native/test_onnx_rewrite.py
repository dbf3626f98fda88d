"""Files in which the native operator replaces masked products: same results, and nothing else changes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from native_models import Array, built_library, masked_file, session
from onnx import TensorProto, helper, numpy_helper

from mpcompile.data.images import Data
from mpcompile.errors import BuildError
from mpcompile.export.mask_check import NAME_SCOPES, ProvenMask
from mpcompile.export.onnx_export import lower
from mpcompile.ir.model import Model
from mpcompile.passes import NMMask
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.runtimes.native.onnx_rewrite import find, replace
from mpcompile.testing import tiny_cnn, tiny_vit


@pytest.fixture(scope="session")
def library() -> Path:
    return built_library()


@pytest.mark.parametrize(
    ("make", "batch", "pattern"),
    [
        (tiny_vit, None, "2:4"),
        (tiny_vit, 3, "2:4x4"),
        (tiny_cnn, None, "4:8x2"),
        (tiny_cnn, 3, "2:4"),
        (tiny_vit, None, "4:8v3"),
    ],
)
def test_replaced_files_compute_the_same(
    library: Path, tmp_path: Path, make: Callable[[], Model], batch: int | None, pattern: str
) -> None:
    made = masked_file(make(), tmp_path, batch, pattern)
    file = onnx.load(made.onnx)
    products, refused = find(file, made.masks)
    found = {name for product in products for name in product.layers}
    assert {row.layer for row in made.masks} == found | {name for row in refused for name in row.layers}
    assert products
    changed = replace(file, products)
    onnx.checker.check_model(changed, full_check=True)
    images = torch.randn(3, *made.model.example.shape[1:]).numpy()
    dense, native, fallback = (
        session(f, lib)(images) for f, lib in ((file, None), (changed, library), (changed, None))
    )
    largest = np.abs(dense).max()
    # 1e-5 of the largest logit: a few layers sum in another order.
    np.testing.assert_allclose(native, dense, rtol=0, atol=1e-5 * largest)
    np.testing.assert_allclose(fallback, dense, rtol=0, atol=1e-5 * largest)


def test_nothing_else_of_the_file_changes(tmp_path: Path) -> None:
    made = masked_file(tiny_vit(), tmp_path)
    file = onnx.load(made.onnx)
    before = file.SerializeToString(deterministic=True)
    products, _ = find(file, made.masks)
    changed = replace(file, products)
    assert file.SerializeToString(deterministic=True) == before
    native_nodes = {node.name: node for node in changed.graph.node if node.domain == "mpcompile"}
    assert set(native_nodes) == {product.name for product in products}
    for product in products:
        old = next(node for node in file.graph.node if node.name == product.name)
        assert [p.key for p in native_nodes[product.name].metadata_props] == [NAME_SCOPES]
        assert native_nodes[product.name].metadata_props[0].value == old.metadata_props[0].value
    gone = {name for product in products for name in product.nodes}
    others = [serialized(node) for node in file.graph.node if node.output[0] not in gone]
    left = [serialized(node) for node in changed.graph.node if node.domain != "mpcompile"]
    # Nodes that only transposed a weight may be gone; no node is new.
    assert [node for node in left if node in others] == left
    stored = {tensor.name for tensor in changed.graph.initializer}
    assert not stored & {product.initializer for product in products}
    assert [(p.key, p.value) for p in changed.metadata_props] == [(p.key, p.value) for p in file.metadata_props]
    assert replace(file, []) is file


def serialized(node: onnx.NodeProto) -> bytes:
    """Returns a node's bytes without its doc string: an empty one may be written or left out."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.ClearField("doc_string")
    return bytes(copy.SerializeToString(deterministic=True))


def graph_of(nodes: list[onnx.NodeProto], weights: dict[str, Array], opset: int = 20) -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")
    stored = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "made", [x], [y], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def proven(weight: Array, pattern: str = "2:4") -> list[ProvenMask]:
    zeros = int((weight == 0).sum())
    return [ProvenMask("layer", "w", ("n",), "MatMul", 0, pattern, 4, zeros, weight.size)]


WEIGHT = np.array([[1, 2, 0, 0, 0, 3, 0, 4], [0, 5, 6, 0, 7, 0, 8, 0]], np.float32)  # out in_, 2:4
BIAS = np.array([0.5, -1], np.float32)
NODE = helper.make_node


@pytest.mark.parametrize(
    ("nodes", "weights"),
    [
        ([NODE("MatMul", ["x", "w"], ["y"], name="n")], {"w": WEIGHT.T}),
        ([NODE("MatMul", ["x", "w"], ["m"], name="n"), NODE("Add", ["m", "b"], ["y"])], {"w": WEIGHT.T, "b": BIAS}),
        ([NODE("MatMul", ["x", "w"], ["m"], name="n"), NODE("Add", ["b", "m"], ["y"])], {"w": WEIGHT.T, "b": BIAS}),
        # Two inputs of the Add read the product, so the Add stays.
        ([NODE("MatMul", ["x", "w"], ["m"], name="n"), NODE("Add", ["m", "m"], ["y"])], {"w": WEIGHT.T}),
        ([NODE("Gemm", ["x", "w", "b"], ["y"], name="n", transB=1)], {"w": WEIGHT, "b": BIAS}),
        ([NODE("Gemm", ["x", "w", "b"], ["y"], name="n")], {"w": WEIGHT.T, "b": BIAS[None]}),
        ([NODE("Gemm", ["x", "w"], ["y"], name="n")], {"w": WEIGHT.T}),
        ([NODE("Transpose", ["w"], ["t"]), NODE("MatMul", ["x", "t"], ["y"], name="n")], {"w": WEIGHT}),
        # Tied weights, one product with a bias.
        (
            [
                NODE("MatMul", ["x", "w"], ["a"], name="n"),
                NODE("MatMul", ["x", "w"], ["c"], name="o"),
                NODE("Add", ["c", "b"], ["d"]),
                NODE("Mul", ["a", "d"], ["y"]),
            ],
            {"w": WEIGHT.T, "b": BIAS},
        ),
    ],
)  # fmt: skip
def test_every_form_of_a_product_is_found(
    library: Path, nodes: list[onnx.NodeProto], weights: dict[str, Array]
) -> None:
    weights = {name: np.ascontiguousarray(array) for name, array in weights.items()}
    file = graph_of(nodes, weights)
    products, refused = find(file, proven(weights["w"]))
    assert (len(products), refused) == (sum(n.op_type in ("MatMul", "Gemm") for n in nodes), [])
    changed = replace(file, products)
    assert not {"MatMul", "Gemm", "Transpose"} & {node.op_type for node in changed.graph.node}
    x = np.random.default_rng(0).standard_normal((5, 8), dtype=np.float32)
    expected = session(file, None)(x)
    for lib in (library, None):
        np.testing.assert_allclose(session(changed, lib)(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("nodes", "weights", "reason"),
    [
        ([NODE("Gemm", ["x", "w"], ["y"], name="n", alpha=0.5)], {"w": WEIGHT.T}, "scales or transposes its input"),
        ([NODE("Gemm", ["x", "w"], ["y"], name="n", transA=1)], {"w": WEIGHT.T}, "scales or transposes its input"),
        (
            [NODE("Gemm", ["x", "w", "x"], ["y"], name="n")],
            {"w": WEIGHT.T},
            "its bias is not a constant with one value per output",
        ),
        ([NODE("MatMul", ["w", "x"], ["y"], name="n")], {"w": WEIGHT}, "its weight is the left operand of the product"),
        ([NODE("MatMul", ["x", "w"], ["y"])], {"w": WEIGHT.T}, "its node has no name of its own"),
        (
            [NODE("Conv", ["x", "w"], ["y"], name="n", group=2)],
            {"w": WEIGHT[:, :, None, None]},
            "it is a convolution with 2 groups; the kernel takes one group",
        ),
        (
            [NODE("Conv", ["x", "w"], ["y"], name="n", auto_pad="SAME_UPPER")],
            {"w": WEIGHT[:, :, None, None]},
            "it is a convolution with auto_pad SAME_UPPER; the kernel takes explicit pads",
        ),
        (
            [NODE("Conv", ["x", "w"], ["y"], name="n")],
            {"w": WEIGHT[:, :, None].repeat(3, -1)},
            "it is a convolution over 1 axes; the kernel takes 2, or 1×1 without strides and padding",
        ),
    ],
)
def test_unsupported_products_are_listed_with_the_reason(
    nodes: list[onnx.NodeProto], weights: dict[str, Array], reason: str
) -> None:
    file = graph_of(nodes, {name: np.ascontiguousarray(array) for name, array in weights.items()})
    products, [row] = find(file, proven(weights["w"]))
    assert (products, reason in row.reason) == ([], True), row.reason


def test_half_precision_and_masks_without_a_pattern_stay_dense(tmp_path: Path) -> None:
    file = graph_of([NODE("MatMul", ["x", "w"], ["y"], name="n")], {"w": np.ascontiguousarray(WEIGHT.T)})
    _, [row] = find(file, proven(WEIGHT, "unstructured"))
    assert row.reason == "its mask is unstructured; the kernel takes N:M"
    masked, _ = PassManager([NMMask()]).run(tiny_vit(), Data())
    half = lower(masked, tmp_path / "half.onnx", precision="fp16")
    products, refused = find(onnx.load(half.onnx), half.masks)
    assert products == []
    assert {row.reason for row in refused} == {"its weight is float16; the kernel computes in float32"}


def test_old_opsets_are_refused() -> None:
    nodes = [NODE("MatMul", ["x", "w"], ["y"], name="n")]
    file = graph_of(nodes, {"w": np.ascontiguousarray(WEIGHT.T)}, opset=17)
    products, _ = find(file, proven(WEIGHT))
    with pytest.raises(BuildError, match="opset 17; the native operator needs 18"):
        replace(file, products)
