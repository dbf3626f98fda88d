"""A model that differs in values only is not translated again, and its file is the one of a fresh translation."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kept_translations import TRANSLATE
from torch import nn

import mpcompile.export.translation as translation_module
from mpcompile.export.onnx_export import lower
from mpcompile.frontend.capture import capture
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.passes import NMMask, ToMe
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.testing import tiny_cnn, tiny_data, tiny_mlp, tiny_source, tiny_vit


@pytest.fixture
def translated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The architecture of each model that torch.onnx translates."""
    found: list[str] = []

    def counted(model: Model, *rest: object) -> object:
        found.append(model.source.arch)
        return TRANSLATE(model, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(translation_module, "_translated", counted)
    return found


@pytest.mark.parametrize("make", [tiny_mlp, tiny_cnn, tiny_vit])
def test_a_masked_model_has_the_file_of_a_fresh_translation(
    make: Callable[[], Model], translated: list[str], tmp_path: Path
) -> None:
    dense = make()
    masked, _ = PassManager([NMMask(NM(2, 4))]).run(dense, tiny_data(dense))
    before = lower(dense, tmp_path / "dense.onnx")
    dense_file = (tmp_path / "dense.onnx").read_bytes()
    after = lower(masked, tmp_path / "masked.onnx", like=before)
    assert len(translated) == 1
    assert len(after.masks) == len(masked.masks())
    lower(masked, tmp_path / "fresh.onnx")
    assert len(translated) == 2
    assert (tmp_path / "masked.onnx").read_bytes() == (tmp_path / "fresh.onnx").read_bytes()
    lower(dense, tmp_path / "again.onnx", like=after)  # what was put into a copy has not changed the translation
    assert (tmp_path / "again.onnx").read_bytes() == dense_file


def test_another_structure_is_translated_again(translated: list[str], tmp_path: Path) -> None:
    dense = tiny_vit()
    before = lower(dense, tmp_path / "dense.onnx")
    merged, _ = PassManager([ToMe(r=2)]).run(dense, tiny_data(dense))
    for model, options in (
        (merged, {}),
        (dense, {"batch": 2}),
        (dense, {"opset": 21}),
        (replace(dense, output_names=("scores",)), {}),
    ):
        count = len(translated)
        lower(model, tmp_path / "other.onnx", like=before, **options)  # type: ignore[arg-type]
        assert len(translated) == count + 1


def test_an_attribute_that_no_repr_shows_counts(translated: list[str], tmp_path: Path) -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = 2.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.factor * x

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.scale = nn.Linear(64, 8), Scale()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale(self.stem(x.flatten(1)))  # type: ignore[no-any-return]

    model = capture(Net().eval(), tiny_source(), leaves=("scale",))
    before = lower(model, tmp_path / "one.onnx")
    other = replace(model, graph=copy.deepcopy(model.graph))
    other.graph.get_submodule("scale").factor = 3.0  # type: ignore[assignment]
    lower(other, tmp_path / "other.onnx", like=before)
    assert len(translated) == 2
