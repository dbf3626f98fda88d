"""The engine on the native int8 operators: its outputs, its reports, its file, and the lanes that its weights need."""

import gc
from pathlib import Path

import numpy as np
import onnx
import pytest
from int8_files import VIT, int8_vit
from kernel_trials import shorten_trials
from numpy.typing import NDArray
from quantized_models import quantised_by_hand

from mpcompile.export.onnx_export import Lowered, lower
from mpcompile.ir.pattern import NM
from mpcompile.runtimes import Build, OnnxRuntime, native
from mpcompile.runtimes.native import int8_products, int8_rewrite
from mpcompile.runtimes.native.build import HERE, LIBRARY
from mpcompile.runtimes.ort import saturation
from mpcompile.runtimes.ort.int8_coverage import int8_coverage
from mpcompile.runtimes.ort.native_kernel import NMEngine
from mpcompile.runtimes.ort.saturation import note, pairs_saturate
from mpcompile.runtimes.ort.session import cpu_engine, fast_engine
from mpcompile.testing import tiny_mlp

native_kernel = pytest.mark.skipif(native.missing() is not None, reason="the native kernel cannot be used here")
MISSING = "mpcompile.runtimes.native.missing"
SATURATES = "mpcompile.runtimes.ort.int8.saturates"


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    return int8_vit(tmp_path_factory.mktemp("vit"))


def engine_of(made: Lowered, monkeypatch: pytest.MonkeyPatch, folder: Path | None = None) -> NMEngine:
    """The engine with every product on the native operator."""
    shorten_trials(monkeypatch, interval=(1.1, 1.2))
    engine = OnnxRuntime().build(made, Build(1, batches=(2,), folder=folder))
    assert isinstance(engine, NMEngine)
    return engine


def images_of(made: Lowered) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((2, *made.image_shape)).astype(np.float32)


@native_kernel
def test_logits_are_those_of_the_plain_file_up_to_roundings(
    vit: Lowered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float sum that ends close to the middle of two steps may round to either; each step is 8/255 of a range.

    The plain file runs without 8-bit kernels: on processors without VNNI these would saturate.
    """
    engine, images = engine_of(vit, monkeypatch, tmp_path), images_of(vit)
    expected = cpu_engine(vit, 1)(images)
    assert np.abs(engine(images) - expected).max() < 0.05 * np.abs(expected).max()
    assert engine.file == tmp_path / "model.native.onnx"
    assert engine.native
    assert not engine.exact
    assert not engine.is_reference


@native_kernel
def test_the_profile_tells_that_the_native_operators_ran(vit: Lowered, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = engine_of(vit, monkeypatch).quantised_layers(images_of(vit))
    assert [row.layer for row in rows] == VIT
    for row in rows:
        assert row.in_8_bits
        assert row.native
        assert row.reason is None
        assert str(row.kernel).startswith("NMGemmInt8")
    plain = fast_engine(vit, 1).quantised_layers(images_of(vit))
    assert {(row.in_8_bits, row.native) for row in plain} == {(True, False)}


@native_kernel
def test_a_file_without_a_folder_lasts_as_long_as_its_engine(vit: Lowered, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(vit, monkeypatch)
    folder = engine.file.parent
    assert engine.file.is_file()
    assert folder != vit.onnx.parent
    del engine
    gc.collect()
    assert not folder.exists()


@native_kernel
def test_verdicts_are_on_masked_layers_only(vit: Lowered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(vit, monkeypatch)
    masked = vit.masks[:3]  # as if the other layers were dense
    rows = engine.judged((), masked, images_of(vit))
    assert {row.layer for row in rows} == {mask.layer for mask in masked}
    for row in rows:
        assert (row.eligible, row.chosen, row.rule) == (True, True, "measured")
        assert row.kernel == f"NMGemmInt8, {native.int8_instruction_set()}"
    assert engine.judged((), (), images_of(vit)) == ()


@native_kernel
def test_a_mask_whose_zeros_are_multiplied_does_not_count_as_run_on_a_sparse_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = int8_vit(tmp_path, "3:4")
    engine = engine_of(made, monkeypatch)
    assert engine.native
    for row in engine.judged((), made.masks, images_of(made)):
        assert (row.eligible, row.chosen, row.kernel) == (False, False, None)
        assert "it multiplies the zeros too" in row.reason


@pytest.mark.parametrize(
    ("saturating", "missing", "lanes"),
    [(False, None, "none"), (False, "no compiler", "none"), (True, None, "blocks"), (True, "no compiler", "pairs")],
)
def test_the_lanes_are_those_of_the_kernel_that_runs(
    monkeypatch: pytest.MonkeyPatch, saturating: bool, missing: str | None, lanes: str
) -> None:
    monkeypatch.setattr(SATURATES, lambda: saturating)
    monkeypatch.setattr(MISSING, lambda: missing)
    assert OnnxRuntime().quantization("int8") == {"activations": "u8", "outputs": "convolutions", "lanes": lanes}


def test_patterns_whose_zeros_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MISSING, lambda: None)
    taken = {"2:4": True, "1:4": True, "8:16": True, "4:16": True, "2:4x4": True, "3:4": False, "16:32": False}
    taken["6:12"] = False
    assert {name: OnnxRuntime().has_quantized_kernel(NM.parse(name)) for name in taken} == taken
    monkeypatch.setattr(MISSING, lambda: "no compiler")
    assert not OnnxRuntime().has_quantized_kernel(NM.parse("2:4"))


@pytest.mark.parametrize(
    ("row", "saturates"),
    [((64, 64), False), ((65, 64), True), ((-64, -64), False), ((-65, -64), True), ((0, 100, 100, 0), False),
     ((127, -127), False), ((100, 1, 127), False)],
)  # fmt: skip
def test_a_pair_saturates_above_a_sum_of_128(row: tuple[int, ...], saturates: bool) -> None:
    weight = np.array([[0] * len(row), row], np.int8)
    assert pairs_saturate(weight, 0) == pairs_saturate(weight.T, 1) == saturates


def test_a_file_that_saturates_without_the_native_kernel_says_so_once(
    vit: Lowered, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(MISSING, lambda: None)
    monkeypatch.setattr(saturation, "saturates", lambda: False)
    assert OnnxRuntime().prepare(vit, tmp_path, Build(1)).notes == ()
    monkeypatch.setattr(saturation, "saturates", lambda: True)
    [text] = OnnxRuntime().prepare(vit, tmp_path, Build(1)).notes
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(vit.onnx).graph.initializer}
    named = [mask.layer for mask in vit.masks if pairs_saturate(stored[mask.initializer], 1)]
    assert len(named) > saturation.MOST_NAMES
    assert text.startswith("ONNX Runtime's own int8 kernels add products in 16 bits on this processor")
    more = len(named) - saturation.MOST_NAMES
    told = f"{', '.join(named[: saturation.MOST_NAMES])} and {more} more"
    assert f"{len(named)} masked layers of model.onnx: {told}. " in text
    assert "if model.native.onnx is run with its library" in text
    assert text.endswith("give the pass quantize `lanes: pairs` in the recipe")
    assert note(int8_vit(tmp_path, None)) == ()


@native_kernel
def test_a_gemm_whose_weight_is_stored_turned_counts_as_run_in_8_bits(tmp_path: Path) -> None:
    """The native operator reads the weight of such a Gemm under another name than the file's."""
    file = tmp_path / "m.onnx"
    lower(quantised_by_hand(tiny_mlp(), ["hidden"]), file, precision="int8", batch=2)
    plain = onnx.load(file)
    products = int8_products.find(plain)
    assert products
    onnx.save(int8_rewrite.replace(plain, products, {}), file)
    [row] = int8_coverage(file, np.zeros((2, 1, 8, 8), np.float32), 1, HERE / LIBRARY)
    assert row.in_8_bits, row.reason
    assert str(row.kernel).startswith("NMGemmInt8")
