"""Selection of the native operator: measured for each product, and for convolutions in the whole file too."""

from dataclasses import replace as with_fields
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from native_models import built_library, masked_file, session
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mpcompile.errors import BuildError
from mpcompile.export.onnx_export import INPUT
from mpcompile.ir.pattern import NM
from mpcompile.measure.timing import Speedup
from mpcompile.runtimes.native import kernel_selection, microbenchmark
from mpcompile.runtimes.native.kernel_selection import accelerate
from mpcompile.runtimes.native.microbenchmark import input_shapes
from mpcompile.runtimes.native.onnx_rewrite import MaskedGemm, find
from mpcompile.runtimes.native.packing import pack
from mpcompile.testing import tiny_cnn, tiny_vit


@pytest.fixture(scope="session")
def library() -> Path:
    return built_library()


@pytest.mark.parametrize("batch", [None, 2])
def test_input_shapes_come_from_the_file_or_a_run(tmp_path: Path, batch: int | None) -> None:
    made = masked_file(tiny_vit(), tmp_path, batch)
    file = onnx.load(made.onnx)
    products, _ = find(file, made.masks)
    shapes = input_shapes(file, products, np.zeros((2, *made.model.example.shape[1:]), np.float32))
    assert {shapes[product.x] for product in products} == {(2, 17, 32), (2, 17, 128)}


def test_each_layer_is_measured_and_gets_a_reason(library: Path, tmp_path: Path) -> None:
    made = masked_file(tiny_cnn(), tmp_path)
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
            faster = choice.speedup.interval[0] > 1
            assert choice.native == (faster and "blocked layout" not in choice.reason)  # which, depends on the times
            assert f"{choice.speedup.ratio:.2f} (" in choice.reason
    np.testing.assert_allclose(session(found.file, library)(images), session(file, None)(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("interval", "taken"), [((1.01, 1.6), True), ((0.99, 1.6), False), ((0.5, 0.7), False)])
def test_the_operator_is_selected_if_the_whole_interval_is_above_1(
    monkeypatch: pytest.MonkeyPatch, library: Path, tmp_path: Path, interval: tuple[float, float], taken: bool
) -> None:
    original = microbenchmark.measure

    def with_interval(*arguments: object) -> tuple[object, object, Speedup]:
        dense, sparse, ratio = original(*arguments)  # type: ignore[arg-type]
        return dense, sparse, with_fields(ratio, interval=interval)

    monkeypatch.setattr(kernel_selection, "measure", with_interval)
    made = masked_file(tiny_vit(), tmp_path, 1)
    found = accelerate(onnx.load(made.onnx), made.masks, library, made.model.example[:1].numpy(), seconds=0.0)
    assert {choice.native for choice in found.choices} == {taken}
    assert found.count == (len(found.choices) if taken else 0)
    assert (INPUT, ("native kernel is not significantly" in found.choices[0].reason)) == ("images", not taken)


@pytest.mark.parametrize(("first", "rounds"), [(2.0, 20), (0.5, 20), (1.0, 40)])
def test_a_product_is_timed_again_if_its_interval_includes_1(
    monkeypatch: pytest.MonkeyPatch, library: Path, tmp_path: Path, first: float, rounds: int
) -> None:
    """The first 20 rounds measure a speedup of `first`; 1.0 stands for noise around 1."""
    noise = np.where(np.arange(20) % 2, 0.5, 1.5) if first == 1.0 else np.full(20, first)
    runs = iter([noise, np.full(20, 2.0)])

    def sampled(calls: object, seconds: float) -> dict[str, NDArray[np.float64]]:
        return {"dense": next(runs), "native": np.ones(20)}

    monkeypatch.setattr(microbenchmark, "sample", sampled)
    made = masked_file(tiny_vit(), tmp_path, 1)
    product = find(onnx.load(made.onnx), made.masks)[0][0]
    packed = pack(product.weight, product.pattern.of)
    dense, sparse, ratio = microbenchmark.measure(product, packed, (1, 17, product.weight.shape[1]), library, 1, 0.0)
    assert dense.count == sparse.count == ratio.count == rounds


def test_convolutions_must_be_faster_in_the_whole_file_too(
    monkeypatch: pytest.MonkeyPatch, library: Path, tmp_path: Path
) -> None:
    original = microbenchmark.measure

    def with_interval(*arguments: object) -> tuple[object, object, Speedup]:
        dense, sparse, ratio = original(*arguments)  # type: ignore[arg-type]
        return dense, sparse, with_fields(ratio, interval=(1.1, 1.2))

    made = masked_file(tiny_cnn(), tmp_path)
    file = onnx.load(made.onnx)
    small, large = (torch.randn(size, *made.model.example.shape[1:]).numpy() for size in (2, 5))
    monkeypatch.setattr(kernel_selection, "measure", with_interval)
    for lows, kept, batch in (
        ((0.9, 1.1), False, "at batch 2 (1"),
        ((1.1, 0.9), False, "at batch 5 (1"),
        ((1.1, 1.1), True, ""),
    ):
        wholes = {size: Speedup(1.0, (low, 1.3), 15, "") for size, low in zip((2, 5), lows, strict=True)}
        monkeypatch.setattr(kernel_selection, "compare_whole", lambda *given, wholes=wholes: wholes[len(given[2])])
        found = accelerate(file, made.masks, library, small, seconds=0.0, also=[large])
        convolutions = [choice for choice in found.choices if choice.dense is not None and len(choice.x or ()) == 4]
        assert convolutions
        assert {choice.native for choice in convolutions} == {kept}
        assert all(("blocked layout" in choice.reason) != kept for choice in convolutions)
        assert all(batch in choice.reason for choice in convolutions)
        assert found.count == sum(node.domain == "mpcompile" for node in found.file.graph.node)


def test_a_file_that_does_not_run_is_a_build_error() -> None:
    # The weight has other taps than the node's kernel_shape: ONNX Runtime loads the file and fails to run it.
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
