"""Exports with a kept table of ONNX functions, or a kept translation, write the files of exports without."""

from pathlib import Path

import pytest
from kept_registry import MADE_BY_TORCH, keep_registry
from kept_translations import TRANSLATE, keep_translations
from torch.onnx._internal.exporter._registration import ONNXRegistry

from mpcompile.export import translation
from mpcompile.export.onnx_export import lower
from mpcompile.testing import tiny_cnn


def test_files_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ONNXRegistry, "from_torchlib", MADE_BY_TORCH)
    monkeypatch.setattr(translation, "_translated", TRANSLATE)
    expected = lower(tiny_cnn(), tmp_path / "expected.onnx").onnx.read_bytes()
    keep_registry(monkeypatch)
    for number in range(2):
        assert lower(tiny_cnn(), tmp_path / f"{number}.onnx").onnx.read_bytes() == expected


def test_an_export_changes_only_its_own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_registry(monkeypatch)
    first = ONNXRegistry.from_torchlib(20)
    [target, rows] = next(iter(first.functions.items()))
    rows.clear()
    second = ONNXRegistry.from_torchlib(20)
    assert second.functions[target]
    assert second.opset_version == first.opset_version == 20


def test_a_kept_translation_makes_the_file_of_a_fresh_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(translation, "_translated", TRANSLATE)
    models = tiny_cnn(seed=0), tiny_cnn(seed=1)
    expected = [lower(model, tmp_path / "expected.onnx").onnx.read_bytes() for model in models]
    keep_translations(monkeypatch)
    assert [lower(model, tmp_path / "kept.onnx").onnx.read_bytes() for model in models] == expected
