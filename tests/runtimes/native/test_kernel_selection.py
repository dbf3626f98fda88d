"""Selection of the native operator: measured for each product, and for the whole file at every batch size."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from native_models import Array, built_library, masked_file, session
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from mpcompile.errors import BuildError
from mpcompile.export.onnx_export import INPUT, Lowered
from mpcompile.frontend.capture import capture
from mpcompile.ir.pattern import NM
from mpcompile.measure.timing import Speedup, Timing
from mpcompile.runtimes.native import kernel_selection, microbenchmark, onnx_rewrite
from mpcompile.runtimes.native.custom_op import GEMM
from mpcompile.runtimes.native.kernel_selection import accelerate, compare_whole
from mpcompile.runtimes.native.microbenchmark import input_shapes
from mpcompile.runtimes.native.onnx_rewrite import MaskedGemm, find
from mpcompile.runtimes.native.packing import pack
from mpcompile.runtimes.native.whole_file import MOST_TRIALS
from mpcompile.testing import tiny_cnn, tiny_source, tiny_vit


@pytest.fixture(scope="session")
def library() -> Path:
    return built_library()


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    """A masked ViT at batch 1."""
    return masked_file(tiny_vit(), tmp_path_factory.mktemp("vit"), 1)


@pytest.fixture(scope="session")
def free_vit(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    """A masked ViT at any batch."""
    return masked_file(tiny_vit(), tmp_path_factory.mktemp("free_vit"))


@pytest.mark.parametrize("batch", [None, 2])
def test_input_shapes_come_from_the_file_or_a_run(tmp_path: Path, batch: int | None) -> None:
    made = masked_file(tiny_vit(), tmp_path, batch)
    file = onnx.load(made.onnx)
    products, _ = find(file, made.masks)
    shapes = input_shapes(file, products, np.zeros((2, *made.model.example.shape[1:]), np.float32))
    assert {shapes[product.x] for product in products} == {(2, 17, 32), (2, 17, 128)}


def hand_in(
    monkeypatch: pytest.MonkeyPatch,
    alone: tuple[float, float],
    whole: Callable[[int, int], tuple[float, float]] = lambda natives, batch: (1.1, 1.3),
) -> list[tuple[int, int]]:
    """Replaces what is measured: the interval of each product alone, and of the whole file by natives and batch size.

    Returns the (number of native operators, batch size) of each comparison of whole files, in their order.
    """
    compared: list[tuple[int, int]] = []

    def product(*arguments: object) -> tuple[Timing, Timing, Speedup]:
        dense, sparse = (Timing(ms, ms, ms, 15, 1, (ms, ms), "cpu") for ms in (1.2, 1.0))
        return dense, sparse, Speedup(1.2, alone, 15, "")

    def file(dense: object, native: onnxruntime.InferenceSession, images: Array, seconds: float) -> Speedup:
        compared.append((int(native.get_modelmeta().custom_metadata_map["natives"]), len(images)))
        return Speedup(1.2, whole(*compared[-1]), 15, "")

    def marked(file: onnx.ModelProto, products: Sequence[MaskedGemm], streams: object) -> onnx.ModelProto:
        rewritten = onnx_rewrite.replace(file, products, streams)  # type: ignore[arg-type]
        if products:
            helper.set_model_props(rewritten, {"natives": str(len(products))})
        return rewritten

    monkeypatch.setattr(kernel_selection, "measure", product)
    monkeypatch.setattr(kernel_selection, "compare_whole", file)
    monkeypatch.setattr(kernel_selection, "replace", marked)
    return compared


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
            assert choice.native == (faster and "whole file" not in choice.reason)  # which, depends on the times
            assert f"{choice.speedup.ratio:.2f} (" in choice.reason
    np.testing.assert_allclose(session(found.file, library)(images), session(file, None)(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("interval", "taken"), [((1.01, 1.6), True), ((0.99, 1.6), False), ((0.5, 0.7), False)])
def test_the_operator_is_selected_if_the_whole_interval_is_above_1(
    monkeypatch: pytest.MonkeyPatch, library: Path, vit: Lowered, interval: tuple[float, float], taken: bool
) -> None:
    hand_in(monkeypatch, interval)
    found = accelerate(onnx.load(vit.onnx), vit.masks, library, vit.model.example[:1].numpy(), seconds=0.0)
    assert {choice.native for choice in found.choices} == {taken}
    assert found.count == (len(found.choices) if taken else 0)
    assert (INPUT, ("native kernel is not significantly" in found.choices[0].reason)) == ("images", not taken)


@pytest.mark.parametrize(("first", "rounds"), [(2.0, 20), (0.5, 20), (1.0, 40)])
def test_a_product_is_timed_again_if_its_interval_includes_1(
    monkeypatch: pytest.MonkeyPatch, library: Path, vit: Lowered, first: float, rounds: int
) -> None:
    """The first 20 rounds measure a speedup of `first`; 1.0 stands for noise around 1."""
    noise = np.where(np.arange(20) % 2, 0.5, 1.5) if first == 1.0 else np.full(20, first)
    runs = iter([noise, np.full(20, 2.0)])

    def sampled(calls: object, seconds: float) -> dict[str, NDArray[np.float64]]:
        return {"dense": next(runs), "native": np.ones(20)}

    monkeypatch.setattr(microbenchmark, "sample", sampled)
    product = find(onnx.load(vit.onnx), vit.masks)[0][0]
    packed = pack(product.weight, product.pattern.of)
    dense, sparse, ratio = microbenchmark.measure(product, packed, (1, 17, product.weight.shape[1]), library, 1, 0.0)
    assert dense.count == sparse.count == ratio.count == rounds


@pytest.mark.parametrize(("batches", "slow"), [((1, 4, 8), None), ((8, 1, 4), 4), ((4, 1, 8), 8), ((2,), 2)])
def test_the_whole_file_must_be_faster_at_every_batch(
    monkeypatch: pytest.MonkeyPatch, library: Path, free_vit: Lowered, batches: tuple[int, ...], slow: int | None
) -> None:
    compared = hand_in(monkeypatch, (1.1, 1.2), lambda natives, batch: (1.01 if batch == slow else 1.1, 1.3))
    images, *also = (torch.randn(size, *free_vit.model.example.shape[1:]).numpy() for size in batches)
    file = onnx.load(free_vit.onnx)
    found = accelerate(file, free_vit.masks, library, images, seconds=0.0, also=also)
    count = len(found.choices)
    if slow is None:
        assert compared == [(count, batch) for batch in sorted(batches)]
        assert found.count == count
        assert {choice.native for choice in found.choices} == {True}
    else:
        assert found.file is file
        assert len({natives for natives, batch in compared}) == MOST_TRIALS
        assert {batch for _, batch in compared} == {batch for batch in batches if batch <= slow}
        for choice in found.choices:
            assert not choice.native
            assert choice.reason.startswith("alone the native kernel is ")
            assert f"not significantly faster at batch {slow}, 1.20 (1.01–1.30) times as fast" in choice.reason
            assert choice.reason.endswith("the dense file; it runs as dense")


class Mixed(nn.Module):
    """A stem, two 1×1 convolutions and two Linear layers that can be masked."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3)
        self.convolutions = nn.ModuleList([nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)])
        self.linear = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for convolution in self.convolutions:
            x = convolution(x).relu()
        x = x.mean((2, 3))
        for linear in self.linear:
            x = linear(x).relu()
        y: torch.Tensor = self.head(x)
        return y


def test_convolutions_are_dropped_first(monkeypatch: pytest.MonkeyPatch, library: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = masked_file(capture(Mixed().eval(), tiny_source()), tmp_path)
    file = onnx.load(made.onnx)
    products = find(file, made.masks)[0]
    gemms = {product.name for product in products if product.op == GEMM}
    assert 0 < len(gemms) < len(products)
    compared = hand_in(monkeypatch, (1.1, 1.2), lambda natives, batch: (1.1 if natives == len(gemms) else 0.9, 1.3))
    small, large = (torch.randn(size, *made.model.example.shape[1:]).numpy() for size in (2, 5))
    found = accelerate(file, made.masks, library, small, seconds=0.0, also=[large])
    assert compared == [(len(products), 2), (len(gemms), 2), (len(gemms), 5)]
    assert {choice.name for choice in found.choices if choice.native} == gemms
    assert {node.name for node in found.file.graph.node if node.domain == "mpcompile"} == gemms
    others = f"it and {len(products) - 1} other"
    for choice in found.choices:
        if choice.dense is not None and not choice.native:
            assert f"with {others}" in choice.reason
            assert "blocked layout" in choice.reason


@pytest.mark.parametrize(("first", "rounds"), [(1.2, 20), (0.5, 20), (1.02, 40)])
def test_whole_files_are_timed_again_if_the_difference_is_not_significant(
    monkeypatch: pytest.MonkeyPatch, vit: Lowered, first: float, rounds: int
) -> None:
    runs = iter([np.full(20, first), np.full(20, 1.2)])
    monkeypatch.setattr(microbenchmark, "sample", lambda calls, seconds: {"dense": next(runs), "native": np.ones(20)})
    whole = microbenchmark.session(onnx.load(vit.onnx), None, 1)
    assert compare_whole(whole, whole, vit.model.example[:1].numpy(), 0.0).count == rounds


def test_a_model_too_large_for_one_message_becomes_a_session(monkeypatch: pytest.MonkeyPatch, vit: Lowered) -> None:
    file = onnx.load(vit.onnx)
    before, images = file.SerializeToString(), vit.model.example[:1].numpy()
    expected = microbenchmark.session(file, None, 1).run(None, {INPUT: images})[0]
    monkeypatch.setattr(microbenchmark, "INLINE_LIMIT_BYTES", 100)
    np.testing.assert_array_equal(microbenchmark.session(file, None, 1).run(None, {INPUT: images})[0], expected)
    assert file.SerializeToString() == before


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
