"""benchmarks/capture.py: a sample of its architectures, what it refuses, and that its results cover the whole list."""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
# Architecture -> layers that are masked at 2:4.
SAMPLE = {
    "timm/vit_tiny_patch16_224": 8,
    "timm/swin_tiny_patch4_window7_224": 19,
    "timm/resnet18:features_only": 10,
    "timm/eva02_tiny_patch14_224:dynamic_img_size": 8,
    "torchvision/vit_b_16": 8,
    "torchvision/segmentation.lraspp_mobilenet_v3_large": 48,
    "torchvision/detection.fasterrcnn_mobilenet_v3_large_fpn:backbone": 48,
    "transformers/ViTForImageClassification": 12,
    "transformers/Swinv2ForImageClassification": 25,
    "transformers/SegformerForSemanticSegmentation": 35,
    "transformers/DetrForObjectDetection": 39,
    "transformers/ViTMAEModel": 11,
    "transformers/CLIPVisionModel": 11,
}


@pytest.fixture(scope="module", autouse=True)
def _folder() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(ROOT / "benchmarks"))
        yield
    for name in [name for name in sys.modules if name == "lib" or name.startswith("lib.") or name == "capture"]:
        sys.modules.pop(name)


@pytest.mark.parametrize("name", SAMPLE)
def test_an_architecture_is_captured_and_masked(name: str) -> None:
    from lib.capture_trial import trial
    from lib.zoo import zoo

    if name.startswith("transformers/"):
        pytest.importorskip("transformers", reason="transformers is not installed: pip install mpcompile[hf]")
    row = trial(name, zoo()[name], onnx=False)
    assert row["captured"], row["reason"]
    assert row["masked"] == row["eligible"] == SAMPLE[name]


def test_the_onnx_file_is_compared_on_all_outputs() -> None:
    from lib.capture_trial import trial
    from lib.zoo_model import ZooModel

    row = trial("two", ZooModel(lambda: Heads(), (3, 8, 8)))
    assert row["onnx"], row
    assert row["outputs"] == 2
    assert row["masked"] == 1


class Heads(nn.Module):
    """Two heads on one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.body = nn.Conv2d(8, 8, 3)
        self.classes = nn.Linear(8, 4)
        self.boxes = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.body(self.stem(x).relu()).relu().mean((2, 3))
        return {"logits": self.classes(features), "boxes": self.boxes(features)}


class ByValue(Heads):
    """A branch on the values of the image."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return super().forward(x if x.mean() > 0 else -x)


class Constant(Heads):
    """The same outputs for every image."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return super().forward(torch.zeros_like(x))


@pytest.mark.parametrize(("kind", "said"), [(ByValue, "depends on the image"), (Constant, "the same for every image")])
def test_what_proves_nothing_is_not_captured(kind: type[Heads], said: str) -> None:
    from lib.capture_trial import trial
    from lib.zoo_model import ZooModel

    row = trial("refused", ZooModel(kind, (3, 8, 8)))
    assert not row["captured"]
    assert said in row["reason"]


def test_a_lost_output_or_another_value_differs() -> None:
    from lib.capture_trial import largest_difference

    one = {"logits": torch.ones(2, 3), "boxes": torch.ones(2, 4)}
    assert largest_difference(one, one) == 0
    assert largest_difference(one, one | {"boxes": torch.full((2, 4), 1.5)}) == 0.5
    assert largest_difference(one, {"logits": one["logits"]}) == float("inf")
    assert largest_difference(one, one | {"boxes": torch.ones(1, 4)}) == float("inf")


def test_a_process_that_hangs_or_dies_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    import lib.isolated

    monkeypatch.setattr(lib.isolated, "PRELOADED", ())
    monkeypatch.setenv("PYTHONPATH", "")
    started = time.monotonic()
    assert lib.isolated.isolated(time.sleep, 60, 1.0) == {"reason": "took longer than 1 s"}
    assert lib.isolated.isolated(os._exit, 3, 30.0) == {"reason": "its process ended with 3"}
    assert time.monotonic() - started < 30


def test_the_results_are_those_of_the_list() -> None:
    from lib.zoo import zoo

    rows = json.loads((ROOT / "benchmarks" / "results" / "capture.json").read_text(encoding="utf-8"))["rows"]
    assert [row["name"] for row in rows] == list(zoo())
    assert len(rows) >= 170
    assert sum(row["name"].startswith("transformers/") for row in rows) >= 45
    assert sum(row["captured"] for row in rows) >= 0.97 * len(rows)
    assert all(row["reason"] for row in rows if not row["captured"] or row.get("onnx") is False)
    assert all(row["way"] and row["masked"] == row["eligible"] for row in rows if row["captured"])
