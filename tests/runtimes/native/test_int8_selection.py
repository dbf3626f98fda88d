"""Selection of the native int8 operators: by measurements of products, of whole files, and with attentions."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from int8_files import int8_vit
from native_models import Array, built_library
from numpy.typing import NDArray
from onnx import helper

from mpcompile.errors import BuildError
from mpcompile.export.onnx_export import INPUT, Lowered
from mpcompile.measure.timing import Speedup, Timing
from mpcompile.runtimes.native import int8_microbenchmark, int8_rewrite, int8_selection
from mpcompile.runtimes.native.custom_op import DOMAIN
from mpcompile.runtimes.native.int8_microbenchmark import skips_zeros
from mpcompile.runtimes.native.int8_ops import GEMM
from mpcompile.runtimes.native.int8_selection import WITHOUT_ATTENTION, accelerate, inspected
from mpcompile.runtimes.native.kernel_selection import Accelerated
from mpcompile.runtimes.native.microbenchmark import session
from mpcompile.runtimes.ort.session import cpu_engine

LAYERS = 8
Compared = list[tuple[int, int, str]]  # native products, batch size and baseline of each comparison


@pytest.fixture(scope="module")
def library() -> Path:
    return built_library()


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    """A masked ViT in int8, at any batch."""
    return int8_vit(tmp_path_factory.mktemp("vit"))


def hand_in(
    monkeypatch: pytest.MonkeyPatch,
    alone: tuple[float, float] = (1.1, 1.2),
    whole: Callable[[int, int], tuple[float, float]] = lambda natives, batch: (1.1, 1.2),
    attention: Callable[[int], tuple[float, float]] = lambda batch: (0.9, 1.1),
) -> Compared:
    """Replaces what is measured: the interval of each product, of the whole file, and of the file with attention."""
    compared: Compared = []

    def product(*arguments: object) -> tuple[Timing, Timing, Speedup]:
        theirs, ours = (Timing(ms, ms, ms, 15, 1, (ms, ms), "cpu") for ms in (1.2, 1.0))
        return theirs, ours, Speedup(1.15, alone, 15, "")

    def file(
        other: object, native: onnxruntime.InferenceSession, images: Array, seconds: float, baseline: str
    ) -> Speedup:
        natives = int(native.get_modelmeta().custom_metadata_map["natives"])
        compared.append((natives, len(images), baseline))
        interval = attention(len(images)) if baseline == WITHOUT_ATTENTION else whole(natives, len(images))
        return Speedup(1.15, interval, 15, baseline)

    replace = int8_rewrite.replace

    def marked(
        file: onnx.ModelProto,
        products: Sequence[object],
        shapes: object,
        attentions: Sequence[object],
        convolutions: Sequence[object],
    ) -> onnx.ModelProto:
        rewritten = replace(file, products, shapes, attentions, convolutions=convolutions)  # type: ignore[arg-type]
        if products or convolutions:
            helper.set_model_props(rewritten, {"natives": str(len(products) + len(convolutions))})
        return rewritten

    for name in ("measure_product", "measure_convolution"):
        monkeypatch.setattr(int8_selection, name, product)
    monkeypatch.setattr(int8_selection, "compare_whole", file)
    monkeypatch.setattr(int8_rewrite, "replace", marked)
    return compared


def images_of(made: Lowered, *batches: int) -> list[NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((batch, *made.image_shape)).astype(np.float32) for batch in batches]


def selected(made: Lowered, library: Path, *batches: int) -> Accelerated:
    first, *others = images_of(made, *batches)
    return accelerate(onnx.load(made.onnx), made.masks, library, first, seconds=0.0, also=others)


def natives(file: onnx.ModelProto, prefix: str) -> int:
    return sum(node.domain == DOMAIN and node.op_type.startswith(prefix) for node in file.graph.node)


@pytest.mark.parametrize(
    ("interval", "taken", "words"),
    [
        ((1.05, 1.3), True, "the native int8 kernel is 1.15 (1.05–1.30) times as fast as ONNX Runtime's"),
        ((0.9, 1.3), True, "(0.90–1.30) times as fast as ONNX Runtime's; it runs there because the whole file gains"),
        ((0.5, 0.7), False, "the native int8 kernel is slower: 1.15 (0.50–0.70) times as fast as ONNX Runtime's"),
    ],
)
def test_a_product_is_a_candidate_unless_it_is_slower_alone(
    monkeypatch: pytest.MonkeyPatch,
    library: Path,
    vit: Lowered,
    interval: tuple[float, float],
    taken: bool,
    words: str,
) -> None:
    compared = hand_in(monkeypatch, interval)
    found = selected(vit, library, 2)
    assert len(found.choices) == LAYERS
    assert {choice.native for choice in found.choices} == {taken}
    assert all(words in choice.reason for choice in found.choices)
    assert bool(compared) == taken
    assert natives(found.file, GEMM) == found.count == (LAYERS if taken else 0)


def test_products_are_dropped_if_the_whole_file_loses_at_a_batch(
    monkeypatch: pytest.MonkeyPatch, library: Path, vit: Lowered
) -> None:
    """All 8 products lose at batch 4, and the faster half wins."""
    compared = hand_in(
        monkeypatch, whole=lambda natives, batch: (0.9, 1.2) if natives == LAYERS and batch == 4 else (1.1, 1.2)
    )
    found = selected(vit, library, 4, 1)
    trials = [(natives, batch) for natives, batch, baseline in compared if baseline != WITHOUT_ATTENTION]
    assert trials == [(8, 1), (8, 4), (4, 1), (4, 4)]
    assert natives(found.file, GEMM) == found.count == 4
    for choice in found.choices:
        assert choice.native == ("whole file is not" not in choice.reason)
        if not choice.native:
            assert choice.reason.startswith("alone the native kernel is 1.15 (1.10–1.20) times as fast as ONNX ")
            assert "with it and 7 others the whole file is not significantly faster at batch 4" in choice.reason
            assert choice.reason.endswith("the file on ONNX Runtime's int8 kernels; it runs on ONNX Runtime's")


def test_a_file_that_never_gains_is_returned_unchanged(
    monkeypatch: pytest.MonkeyPatch, library: Path, vit: Lowered
) -> None:
    hand_in(monkeypatch, whole=lambda natives, batch: (0.99, 1.2), attention=lambda batch: (1.5, 1.6))
    found = selected(vit, library, 2)
    assert found.count == 0
    assert found.file == onnx.load(vit.onnx)


@pytest.mark.parametrize(("slow", "taken"), [(None, True), (1, False), (4, False)])
def test_attentions_are_replaced_only_if_the_file_gains_at_every_batch(
    monkeypatch: pytest.MonkeyPatch, library: Path, vit: Lowered, slow: int | None, taken: bool
) -> None:
    hand_in(monkeypatch, attention=lambda batch: (0.95, 1.2) if batch == slow else (1.1, 1.2))
    found = selected(vit, library, 1, 4)
    assert natives(found.file, GEMM) == LAYERS
    assert natives(found.file, "Attention") == (2 if taken else 0)


@pytest.mark.parametrize("batch", [None, 3])
def test_a_dense_file_gets_native_operators_at_free_and_fixed_batches(
    monkeypatch: pytest.MonkeyPatch, library: Path, tmp_path: Path, batch: int | None
) -> None:
    hand_in(monkeypatch, attention=lambda batch: (1.1, 1.2))
    made = int8_vit(tmp_path, None, batch)
    found = selected(made, library, batch or 2)
    assert {choice.pattern for choice in found.choices} == {None}
    assert not any("multiplies the zeros" in choice.reason for choice in found.choices)
    assert (natives(found.file, GEMM), natives(found.file, "Attention")) == (LAYERS, 2)
    [images] = images_of(made, batch or 2)
    theirs = cpu_engine(made, 1)(images)  # without 8-bit kernels, which may saturate
    ours = session(found.file, library, 1).run(None, {INPUT: images})[0]
    assert np.abs(ours - theirs).max() < 0.05 * np.abs(theirs).max()  # a few steps of 8 bits


def test_a_mask_whose_zeros_the_kernel_multiplies_is_told(
    monkeypatch: pytest.MonkeyPatch, library: Path, tmp_path: Path
) -> None:
    hand_in(monkeypatch)
    found = selected(int8_vit(tmp_path, "3:4"), library, 2)
    for choice in found.choices:
        assert choice.native
        assert not choice.skips_zeros
        assert choice.reason.endswith("are kept: give a --pattern of 2:4, 4:8, 8:16 or sparser")


def test_the_zeros_of_a_vocabulary_are_skipped(monkeypatch: pytest.MonkeyPatch, library: Path, tmp_path: Path) -> None:
    hand_in(monkeypatch)
    found = selected(int8_vit(tmp_path, "4:8v3"), library, 2)
    assert all(choice.native and choice.skips_zeros for choice in found.choices)


@pytest.mark.parametrize(("kept", "columns", "skips"), [(8, 32, True), (9, 32, False), (8, 24, True), (1, 3, True)])
def test_zeros_are_skipped_at_most_8_kept_of_16(kept: int, columns: int, skips: bool) -> None:
    weight = np.zeros((columns, 4), np.int8)
    weight[: min(kept, columns), 1] = 1
    assert skips_zeros(weight) == skips


def test_threads_and_equal_products_are_passed_on(monkeypatch: pytest.MonkeyPatch, library: Path, vit: Lowered) -> None:
    hand_in(monkeypatch)
    measured, opened = [], []
    product = int8_microbenchmark.measure_product

    def counted(product_: object, x: tuple[int, ...], library: Path, threads: int, seconds: float) -> object:
        measured.append((x, threads))
        return product(product_, x, library, threads, seconds)  # type: ignore[arg-type]

    def recorded(file: onnx.ModelProto, used: Path | None, threads: int | None) -> onnxruntime.InferenceSession:
        opened.append(threads)
        return session(file, used, threads)

    monkeypatch.setattr(int8_selection, "measure_product", counted)
    monkeypatch.setattr(int8_selection, "session", recorded)
    [images] = images_of(vit, 2)
    accelerate(onnx.load(vit.onnx), vit.masks, library, images, threads=2, seconds=0.0)
    assert measured == [((2, 17, width), 2) for width in (32, 32, 32, 128)]  # of both blocks, each shape once
    assert set(opened) == {2, None}  # None: runs that only read values


def test_a_product_with_more_channels_than_the_operator_takes_is_left(
    monkeypatch: pytest.MonkeyPatch, library: Path, vit: Lowered
) -> None:
    """As if the operator took at most 32 input channels: fc2 of both blocks has 128."""
    monkeypatch.setattr(int8_selection, "MOST_COLUMNS", 32)
    hand_in(monkeypatch)
    found = selected(vit, library, 2)
    left = {choice.layers[0] for choice in found.choices if not choice.native}
    assert left == {"blocks.0.mlp.fc2", "blocks.1.mlp.fc2"}
    assert natives(found.file, GEMM) == LAYERS - 2


def test_a_file_that_does_not_run_is_an_error_in_words(library: Path, vit: Lowered) -> None:
    with pytest.raises(BuildError, match="ONNX Runtime cannot run the file on 2 images: "):
        inspected(onnx.load(vit.onnx), np.zeros((2, 5, 5, 5), np.float32))
