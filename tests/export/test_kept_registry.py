"""The table of ONNX functions that tests keep between exports is the one that torch makes."""

from pathlib import Path

import pytest
from kept_registry import MADE_BY_TORCH, keep_registry
from torch.onnx._internal.exporter._registration import ONNXRegistry

from mpcompile.export.onnx_export import lower
from mpcompile.testing import tiny_cnn


def test_files_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ONNXRegistry, "from_torchlib", MADE_BY_TORCH)
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
