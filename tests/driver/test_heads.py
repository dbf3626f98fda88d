"""One logit and several labels from images to report: decisions by thresholds, and a gate on a wrong dense model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mpcompile
from mpcompile.driver.artifact import Artifact
from mpcompile.errors import AccuracyError
from mpcompile.recipe.schema import Recipe

SIZE = (1, 8, 8)


class Brightness(nn.Module):
    """Answers whether an image is brighter than half, as one probability or as `classes` equal steps of brightness."""

    def __init__(self, classes: int = 1, flip: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.hidden, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, classes)
        with torch.no_grad():
            self.stem.weight.copy_(torch.eye(64))
            self.stem.bias.zero_()
            if classes == 1:
                self.head.weight.fill_(-0.3 if flip else 0.3)
                self.head.bias.zero_()
            else:
                steps = 2 * (torch.arange(classes) + 0.5) / classes - 1  # of the mean of images in [-1, 1]
                self.head.weight.copy_((20 * steps / 64)[:, None].expand(-1, 64))
                self.head.bias.copy_(-10 * steps.square())
        self.classes = classes
        self.pretrained_cfg = {"input_size": SIZE, "mean": (0.5,), "std": (0.5,)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x.flatten(1))
        outputs = self.head(x + 0.05 * torch.relu(self.hidden(x)))
        return torch.sigmoid(outputs) if self.classes == 1 else outputs


def write_images(path: Path, classes: int, shift: int = 0) -> None:
    """Images of 2 or more steps of brightness, whose label is the step plus `shift`."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, count in (("calibration", 64), ("heldout", 200)):
        labels = rng.integers(0, classes, count)
        level = (labels + 0.5)[:, None, None] / classes * 255
        images = np.clip(level + rng.normal(0, 10, (count, 8, 8)), 0, 255)
        arrays |= {f"{split}_images": images.astype(np.uint8), f"{split}_labels": (labels + shift) % classes}
    np.savez(path, **arrays)


def recipe(**more: Any) -> Recipe:
    passes = [{"nm-mask": {"pattern": "1:16"}}, "certify"]
    options = {"passes": passes, "bench": {"seconds": 0.05, "batches": [1]}, "data": {"calibration": 64}}
    return Recipe.checked(options | more)


def test_a_model_with_one_output_is_judged_at_its_threshold(tmp_path: Path) -> None:
    write_images(tmp_path / "a.npz", 2)
    found = mpcompile.compile(Brightness(), recipe(), data=tmp_path / "a.npz", output=tmp_path / "out").report
    assert found.comparison is not None
    assert found.comparison.dense is not None
    assert found.comparison.dense.top1 > 0.95
    assert found.comparison.dense_check is not None
    assert found.comparison.dense_check.reasons == ()
    arrays = np.load(tmp_path / "a.npz")
    pixels = torch.from_numpy(arrays["heldout_images"][:, None] / 255).float() * 2 - 1
    with torch.no_grad():
        dense = Brightness()(pixels).numpy()
    engine = Artifact.open(tmp_path / "out").load("onnx")
    same = ((engine(pixels.numpy()) > 0.5) == (dense > 0.5)).mean()
    assert found.comparison.agreement == pytest.approx(float(same))
    assert found.certificate is not None
    assert found.certificate.agreeing == round(200 * float(same))
    assert any("whether it exceeds 0.5" in note for note in found.data.notes)
    page = (tmp_path / "out/report.md").read_text()
    assert "accuracy, 200 held-out images" in page
    assert "the distance of its logit to the threshold" in page


def test_a_wrong_order_of_labels_fails_the_gate(tmp_path: Path) -> None:
    write_images(tmp_path / "a.npz", 4, shift=1)
    gated = recipe(gates={"max_drop": 50})
    with pytest.raises(AccuracyError, match="fails its gate: the dense model is right on .* order of the labels"):
        mpcompile.compile(Brightness(4), gated, data=tmp_path / "a.npz", output=tmp_path / "out")
    found = Artifact.open(tmp_path / "out").report
    assert [gate.holds for gate in found.gates] == [True, False]
    assert found.verdict[0].startswith("Warning: the dense model is right on ")


def test_swapped_labels_of_one_output_fail_the_gate(tmp_path: Path) -> None:
    write_images(tmp_path / "a.npz", 2)
    gated = recipe(gates={"max_drop": 50})
    with pytest.raises(AccuracyError, match="the order of the labels is wrong"):
        mpcompile.compile(Brightness(flip=True), gated, data=tmp_path / "a.npz", output=tmp_path / "out")


def test_right_labels_keep_the_gate(tmp_path: Path) -> None:
    write_images(tmp_path / "a.npz", 4)
    found = mpcompile.compile(
        Brightness(4), recipe(gates={"max_drop": 50}), data=tmp_path / "a.npz", output=tmp_path / "out"
    ).report
    assert [gate.holds for gate in found.gates] == [True]
