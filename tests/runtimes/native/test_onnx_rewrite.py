"""Files with the native operator in place of masked products: same results, anywhere, and only where it is faster."""

from collections.abc import Callable
from dataclasses import replace as with_fields
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mpcompile.data.images import Data
from mpcompile.errors import BuildError
from mpcompile.export.mask_check import NAME_SCOPES, ProvenMask
from mpcompile.export.onnx_export import INPUT, Lowered, lower
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.measure.timing import Speedup
from mpcompile.passes import NMMask
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.runtimes import native
from mpcompile.runtimes.native import kernel_selection as choose
from mpcompile.runtimes.native import microbenchmark as trial
from mpcompile.runtimes.native.kernel_selection import accelerate
from mpcompile.runtimes.native.microbenchmark import input_shapes
from mpcompile.runtimes.native.onnx_rewrite import MaskedGemm, find, replace
from mpcompile.runtimes.native.packing import pack
from mpcompile.testing import tiny_cnn, tiny_vit

Array = NDArray[np.float32]


@pytest.fixture(scope="session")
def library() -> Path:
    """The built library; what is missing is the reason to skip."""
    found = native.library()
    if found is None:
        pytest.skip(native.missing() or "")
    return found


def lowered(model: Model, folder: Path, batch: int | None = None, pattern: str = "2:4") -> Lowered:
    result, _ = PassManager([NMMask(NM.parse(pattern))]).run(model, Data())
    return lower(result, folder / "model.onnx", batch=batch)


def session(file: onnx.ModelProto, library: Path | None) -> Callable[[Array], Array]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if library is not None:
        options.register_custom_ops_library(str(library))
    made = onnxruntime.InferenceSession(file.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: made.run(None, {made.get_inputs()[0].name: x})[0]


@pytest.mark.parametrize(
    ("make", "batch", "pattern"),
    [(tiny_vit, None, "2:4"), (tiny_vit, 3, "2:4x4"), (tiny_cnn, None, "4:8x2"), (tiny_cnn, 3, "2:4")],
)
def test_replaced_files_compute_the_same(
    library: Path, tmp_path: Path, make: Callable[[], Model], batch: int | None, pattern: str
) -> None:
    made = lowered(make(), tmp_path, batch, pattern)
    file = onnx.load(made.onnx)
    products, refused = find(file, made.masks)
    found = {name for product in products for name in product.layers}
    assert {row.layer for row in made.masks} == found | {name for row in refused for name in row.layers}
    assert products
    changed = replace(file, products)
    onnx.checker.check_model(changed, full_check=True)
    images = torch.randn(3, *made.model.example.shape[1:]).numpy()
    dense, fast, body = (session(f, lib)(images) for f, lib in ((file, None), (changed, library), (changed, None)))
    largest = np.abs(dense).max()
    # 1e-5 of the largest logit: the sums run in another order through a few layers.
    np.testing.assert_allclose(fast, dense, rtol=0, atol=1e-5 * largest)
    np.testing.assert_allclose(body, dense, rtol=0, atol=1e-5 * largest)


def test_nothing_else_of_the_file_changes(tmp_path: Path) -> None:
    made = lowered(tiny_vit(), tmp_path)
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
    others = [n.SerializeToString(deterministic=True) for n in file.graph.node if n.output[0] not in gone]
    left = [n.SerializeToString(deterministic=True) for n in changed.graph.node if n.domain != "mpcompile"]
    assert [n for n in left if n in others] == left  # nodes that only turned a weight may be gone, none is new
    stored = {tensor.name for tensor in changed.graph.initializer}
    assert not stored & {product.initializer for product in products}
    assert [(p.key, p.value) for p in changed.metadata_props] == [(p.key, p.value) for p in file.metadata_props]
    assert replace(file, []).SerializeToString(deterministic=True) == before


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
        # The product is read twice: its Add stays.
        ([NODE("MatMul", ["x", "w"], ["m"], name="n"), NODE("Add", ["m", "m"], ["y"])], {"w": WEIGHT.T}),
        ([NODE("Gemm", ["x", "w", "b"], ["y"], name="n", transB=1)], {"w": WEIGHT, "b": BIAS}),
        ([NODE("Gemm", ["x", "w", "b"], ["y"], name="n")], {"w": WEIGHT.T, "b": BIAS[None]}),
        ([NODE("Gemm", ["x", "w"], ["y"], name="n")], {"w": WEIGHT.T}),
        ([NODE("Transpose", ["w"], ["t"]), NODE("MatMul", ["x", "t"], ["y"], name="n")], {"w": WEIGHT}),
        # Tied weights, one of them with a bias.
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
        ([NODE("Gemm", ["x", "w", "x"], ["y"], name="n")], {"w": WEIGHT.T}, "its bias is not one constant an output"),
        ([NODE("MatMul", ["w", "x"], ["y"], name="n")], {"w": WEIGHT}, "its weight stands on the left of the product"),
        ([NODE("MatMul", ["x", "w"], ["y"])], {"w": WEIGHT.T}, "its node has no name of its own"),
        (
            [NODE("Conv", ["x", "w"], ["y"], name="n", strides=[2, 2])],
            {"w": WEIGHT[:, :, None, None]},
            "it is a convolution with groups, strides or padding",
        ),
        (
            [NODE("Conv", ["x", "w"], ["y"], name="n", auto_pad="SAME_UPPER")],
            {"w": WEIGHT[:, :, None, None]},
            "it is a convolution with padding",
        ),
        (
            [NODE("Conv", ["x", "w"], ["y"], name="n")],
            {"w": WEIGHT[:, :, None, None].repeat(3, -1)},
            "it is a convolution of 1×3 taps; the kernel takes 1×1",
        ),
    ],
)
def test_what_the_kernel_does_not_compute_is_said(
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


@pytest.mark.parametrize("batch", [None, 2])
def test_input_shapes_come_from_the_file_or_a_run(tmp_path: Path, batch: int | None) -> None:
    made = lowered(tiny_vit(), tmp_path, batch)
    file = onnx.load(made.onnx)
    products, _ = find(file, made.masks)
    shapes = input_shapes(file, products, np.zeros((2, *made.model.example.shape[1:]), np.float32))
    assert {shapes[product.x] for product in products} == {(2, 17, 32), (2, 17, 128)}


def test_each_layer_is_measured_and_gets_a_reason(library: Path, tmp_path: Path) -> None:
    made = lowered(tiny_cnn(), tmp_path)
    file = onnx.load(made.onnx)
    images = torch.randn(2, *made.model.example.shape[1:]).numpy()
    found = accelerate(file, made.masks, library, images, threads=1, seconds=0.0)
    assert {name for choice in found.choices for name in choice.layers} == {row.layer for row in made.masks}
    assert found.count == sum(node.domain == "mpcompile" for node in found.file.graph.node)
    for choice in found.choices:
        if choice.speedup is None:
            assert choice.reason.endswith("it runs as dense")
            assert not choice.native
        else:
            assert choice.dense is not None
            assert choice.sparse is not None
            alone = choice.speedup.interval[0] > 1
            assert choice.native == (alone and "layout of its own" not in choice.reason)  # only times decide which
            assert f"{choice.speedup.ratio:.2f} (" in choice.reason
    np.testing.assert_allclose(session(found.file, library)(images), session(file, None)(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("interval", "taken"), [((1.01, 1.6), True), ((0.99, 1.6), False), ((0.5, 0.7), False)])
def test_the_operator_is_taken_where_the_whole_interval_is_faster(
    monkeypatch: pytest.MonkeyPatch, library: Path, tmp_path: Path, interval: tuple[float, float], taken: bool
) -> None:
    original = trial.measure

    def pretended(*arguments: object) -> tuple[object, object, Speedup]:
        dense, sparse, ratio = original(*arguments)  # type: ignore[arg-type]
        return dense, sparse, with_fields(ratio, interval=interval)

    monkeypatch.setattr(choose, "measure", pretended)
    made = lowered(tiny_vit(), tmp_path, 1)
    found = accelerate(onnx.load(made.onnx), made.masks, library, made.model.example[:1].numpy(), seconds=0.0)
    assert {choice.native for choice in found.choices} == {taken}
    assert found.count == (len(found.choices) if taken else 0)
    assert (INPUT, ("native kernel is not surely" in found.choices[0].reason)) == ("images", not taken)


@pytest.mark.parametrize(("first", "rounds"), [(2.0, 20), (0.5, 20), (1.0, 40)])
def test_a_product_is_timed_again_where_its_interval_includes_1(
    monkeypatch: pytest.MonkeyPatch, library: Path, tmp_path: Path, first: float, rounds: int
) -> None:
    """`first` times as fast as dense in a first run of 20 rounds, where 1.0 stands for noise around it."""
    noise = np.where(np.arange(20) % 2, 0.5, 1.5) if first == 1.0 else np.full(20, first)
    runs = iter([noise, np.full(20, 2.0)])

    def sampled(calls: object, seconds: float) -> dict[str, NDArray[np.float64]]:
        return {"dense": next(runs), "native": np.ones(20)}

    monkeypatch.setattr(trial, "sample", sampled)
    made = lowered(tiny_vit(), tmp_path, 1)
    product = find(onnx.load(made.onnx), made.masks)[0][0]
    packed = pack(product.weight, product.pattern.of)
    dense, sparse, ratio = trial.measure(product, packed, (1, 17, product.weight.shape[1]), library, 1, 0.0)
    assert dense.count == sparse.count == ratio.count == rounds


def test_convolutions_have_to_pass_in_the_whole_file_too(
    monkeypatch: pytest.MonkeyPatch, library: Path, tmp_path: Path
) -> None:
    original = trial.measure

    def pretended(*arguments: object) -> tuple[object, object, Speedup]:
        dense, sparse, ratio = original(*arguments)  # type: ignore[arg-type]
        return dense, sparse, with_fields(ratio, interval=(1.1, 1.2))

    made = lowered(tiny_cnn(), tmp_path)
    file = onnx.load(made.onnx)
    small, large = (torch.randn(size, *made.model.example.shape[1:]).numpy() for size in (2, 5))
    monkeypatch.setattr(choose, "measure", pretended)
    for lows, kept, why in (
        ((0.9, 1.1), False, "at batch 2 (1"),
        ((1.1, 0.9), False, "at batch 5 (1"),
        ((1.1, 1.1), True, ""),
    ):
        wholes = {size: Speedup(1.0, (low, 1.3), 15, "") for size, low in zip((2, 5), lows, strict=True)}
        monkeypatch.setattr(choose, "compare_whole", lambda *given, wholes=wholes: wholes[len(given[2])])
        found = accelerate(file, made.masks, library, small, seconds=0.0, also=[large])
        convolutions = [choice for choice in found.choices if choice.dense is not None and len(choice.x or ()) == 4]
        assert convolutions
        assert {choice.native for choice in convolutions} == {kept}
        assert all(("layout of its own" in choice.reason) != kept for choice in convolutions)
        assert all(why in choice.reason for choice in convolutions)
        assert found.count == sum(node.domain == "mpcompile" for node in found.file.graph.node)


def test_a_file_that_does_not_run_is_an_error_of_building() -> None:
    # A weight of other taps than the node says: ONNX Runtime loads it, and fails when it runs.
    weight = np.zeros((16, 1, 8, 8), np.float32)
    nodes = [
        helper.make_node("Conv", [INPUT, "w"], ["h"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("MatMul", ["h", "v"], ["y"], name="product"),
    ]
    stored = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.zeros((8, 4), np.float32), "v")]
    free = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in (INPUT, "y")]
    file = helper.make_model(helper.make_graph(nodes, "g", free[:1], free[1:], stored), ir_version=8)
    rows = np.zeros((4, 8), np.float32), np.zeros(4, np.float32)
    product = MaskedGemm(("layer",), "product", "MatMul", "h", "y", ("y",), "v", NM(2, 4), *rows)
    with pytest.raises(BuildError, match=r"ONNX Runtime cannot run the file on images of shape \(1, 1, 8, 8\): "):
        input_shapes(file, [product], np.zeros((1, 1, 8, 8), np.float32))
