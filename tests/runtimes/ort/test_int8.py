"""int8 baselines made by ONNX Runtime's own tools: with the better weight width on each CPU."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import mpcompile.runtimes.ort.int8 as ort_int8
from mpcompile.export.onnx_export import Exported, lower
from mpcompile.ir.model import Model
from mpcompile.runtimes import QuantizedBaseline
from mpcompile.runtimes.ort.int8 import quantised, saturates
from mpcompile.runtimes.ort.session import OrtEngine, session_on
from mpcompile.testing import tiny_cnn, tiny_data, tiny_vit

KINDS = ("int8, dynamic", "int8, static")
# Emulates an x86 CPU with AVX2 and without VNNI.
EMULATOR = ("qemu-x86_64", "-cpu", "max")


def exported_of(model: Model, folder: Path, batch: int | None = None) -> tuple[Exported, NDArray[np.float32]]:
    """Returns a dense file and 10 calibration images."""
    return lower(model, folder / "dense.onnx", batch=batch), tiny_data(model).calibration.first(10).numpy()


def largest_weight(baseline: QuantizedBaseline) -> int:
    """Returns the largest absolute value of an int8 weight."""
    assert isinstance(baseline.engine, OrtEngine)
    stored = map(onnx.numpy_helper.to_array, onnx.load(baseline.engine.file).graph.initializer)
    return max(int(np.abs(values.astype(np.int32)).max()) for values in stored if values.dtype == np.int8)


@pytest.mark.parametrize("saturating", [False, True])
def test_int8_of_a_cnn_and_of_a_fixed_batch(tmp_path: Path, saturating: bool) -> None:
    for build, batch in ((tiny_cnn, None), (tiny_vit, 3)):
        exported, images = exported_of(build(), tmp_path, batch)
        # If this CPU saturates, 8-bit weights alone would exceed the tolerance below.
        made = quantised(exported, 1, images, tmp_path, saturating=saturating or saturates())
        assert tuple(made) == KINDS
        expected = session_on(exported.onnx, 1)(images)
        for found in made.values():
            assert isinstance(found, QuantizedBaseline), found
            # 8 bits per number: an error of some per cent of the largest logit after a few layers.
            assert np.abs(found.engine(images) - expected).max() < 0.2 * np.abs(expected).max()


def test_weights_have_8_bits_if_products_are_exact(tmp_path: Path) -> None:
    exported, images = exported_of(tiny_vit(), tmp_path)
    for found in quantised(exported, 1, images, tmp_path, saturating=False).values():
        assert isinstance(found, QuantizedBaseline), found
        assert found.method == ("8-bit weights, since ONNX Runtime's u8 × s8 products are exact on this processor")
        assert largest_weight(found) == 127


@pytest.mark.parametrize("better", [7, 8])
def test_if_products_saturate_the_width_closer_to_dense_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, better: int
) -> None:
    exported, images = exported_of(tiny_vit(), tmp_path)

    def opened(file: Path, threads: int | None = None) -> OrtEngine:
        """Opens a session; the logits of the width that must lose are shifted, as saturation would do."""
        session = session_on(file, threads)
        worse = file.stem.endswith(f"{15 - better}_bits")
        return Shifted(session.session, file) if worse else session

    monkeypatch.setattr(ort_int8, "session_on", opened)
    for found in quantised(exported, 1, images, tmp_path, saturating=True).values():
        assert isinstance(found, QuantizedBaseline), found
        assert largest_weight(found) == (64 if better == 7 else 127)
        assert found.method.startswith(
            f"{better}-bit weights: ONNX Runtime's u8 × s8 products saturate at 16 bits on this processor, as on x86 "
            "without VNNI; logits of the calibration images shift by "
        )
        assert found.method.endswith(f" with {15 - better}-bit weights")


class Shifted(OrtEngine):
    """An engine whose logits are shifted by a constant."""

    def __call__(self, images: NDArray[np.float32], *others: NDArray[Any]) -> NDArray[np.float32]:
        return super().__call__(images, *others) + np.float32(9)


def test_logits_that_are_not_finite_shift_infinitely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nan = np.full((2, 3), np.nan, np.float32)
    assert ort_int8._shift(nan, np.zeros((2, 3), np.float32)) == np.inf


def test_if_one_width_fails_the_other_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported, images = exported_of(tiny_vit(), tmp_path)
    plain = ort_int8.quantise_dynamic

    def made(file: Path, path: Path, reduced: bool) -> None:
        if reduced:
            raise ValueError("no such width")
        plain(file, path, reduced)

    monkeypatch.setattr(ort_int8, "quantise_dynamic", made)
    found = quantised(exported, 1, images, tmp_path, saturating=True)["int8, dynamic"]
    assert isinstance(found, QuantizedBaseline)
    assert found.method.startswith("8-bit weights: ")

    def refused(file: Path, path: Path, reduced: bool) -> None:
        raise ValueError("no such file\nand a page of advice")

    monkeypatch.setattr(ort_int8, "quantise_dynamic", refused)
    assert quantised(exported, 1, images, tmp_path, saturating=True)["int8, dynamic"] == "ValueError: no such file"


def test_half_precision_is_not_quantised_and_says_so(tmp_path: Path) -> None:
    exported = lower(tiny_vit(), tmp_path / "dense.onnx", precision="fp16")
    found = quantised(exported, 1, np.zeros((1, 1, 8, 8), np.float32), tmp_path, saturating=False)
    assert found == {"int8": "ONNX Runtime's tools quantise float32 files, and this one is fp16"}


# ---- saturation on the CPU


def in_16_bits(x: NDArray[np.uint8], w: NDArray[np.int8]) -> NDArray[np.int32]:
    """Returns the product as `vpmaddubsw` computes it: sums of neighbouring pairs saturate at 16 bits."""
    terms = x.astype(np.int32)[:, :, None] * w.astype(np.int32)[None]
    pairs = terms[:, 0::2] + terms[:, 1::2]
    summed: NDArray[np.int32] = pairs.clip(-(2**15), 2**15 - 1).sum(1, dtype=np.int32)
    return summed


@given(st.integers(0, 2**32 - 1))
def test_seven_bit_weights_cannot_saturate(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.choice(np.array([0, 1, 254, 255], np.uint8), (4, 32))
    w = rng.choice(np.array([-64, -63, 63, 64], np.int8), (32, 5))
    assert (in_16_bits(x, w) == x.astype(np.int32) @ w.astype(np.int32)).all()


@pytest.mark.parametrize("saturating", [False, True])
def test_the_probe_detects_saturation(monkeypatch: pytest.MonkeyPatch, saturating: bool) -> None:
    def product(model: onnx.ModelProto, x: NDArray[np.uint8]) -> NDArray[np.int32]:
        weight = onnx.numpy_helper.to_array(model.graph.initializer[0])
        return in_16_bits(x, weight) if saturating else x.astype(np.int32) @ weight.astype(np.int32)

    monkeypatch.setattr(ort_int8, "_run_once", product)
    assert saturates.__wrapped__() == saturating


def test_the_probe_runs_on_this_cpu() -> None:
    assert saturates() in (False, True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(EMULATOR[0]) is None, reason="qemu-x86_64 is not installed: apt install qemu-user")
def test_without_vnni_the_files_are_closer_to_dense_than_with_8_bit_weights(tmp_path: Path) -> None:
    """Runs on an emulated CPU."""
    exported, images = exported_of(tiny_vit(), tmp_path)
    labels = np.zeros(len(images), np.int64)
    np.savez(tmp_path / "images.npz", calibration=images, held_out=images, labels=labels)
    worker = Path(__file__).parents[3] / "benchmarks" / "lib" / "int8_worker.py"
    command = [*EMULATOR, sys.executable, str(worker), str(exported.onnx.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["saturates"] is True
    shift = {(row["kind"], row["when"]): row["shift"] for row in result["rows"]}
    for kind in KINDS:
        assert shift[kind, "now"] <= shift[kind, "before"]
