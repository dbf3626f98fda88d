"""A folder that save_pretrained wrote is compressed with no other option, for each kind of vision model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commandline import mpcompile as command
from hugging_face_models import LABELS, hugging_face, needs_transformers, saved
from PIL import Image

import mpcompile
from mpcompile.driver.artifact import Artifact
from mpcompile.recipe.schema import Recipe

pytestmark = needs_transformers
QUICK = Recipe.checked(
    {
        "target": "ort",
        "bench": {"batches": [1], "seconds": 0.05, "threads": 1},
        "passes": ["permute", {"nm-mask": {"pattern": "2:4"}}],
    }
)


def classified_images(folder: Path, module: Any, processor: Any, count: int = 96) -> Path:
    """Image files in class folders: each in the folder with the label that the dense model gives it."""
    rng = np.random.default_rng(0)
    for index in range(count):
        low = rng.integers(0, 256, (2, 2, 3), np.uint8)
        picture = Image.fromarray(low).resize((40, 36), Image.Resampling.BICUBIC)
        with torch.no_grad():
            label = int(module(**processor(picture, return_tensors="pt")).logits.argmax())
        path = folder / LABELS[label] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    return folder


def test_a_folder_needs_no_other_option(tmp_path: Path) -> None:
    """Pixels, labels and weights are those of transformers: the dense accuracy on its own answers is 100 %."""
    import transformers

    module = hugging_face("ViTForImageClassification")
    with torch.no_grad():
        module.classifier.weight.mul_(50)  # type: ignore[operator, union-attr]
    folder = saved(tmp_path / "model", module)
    images = classified_images(tmp_path / "images", module, transformers.ViTImageProcessor.from_pretrained(folder))
    assert len(list(images.iterdir())) > 1
    done = command(folder, "--pattern", "2:4", "--target", "ort", "--data", images, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    artifact = Artifact.open(tmp_path / "out")
    compared = artifact.report.comparison
    assert compared is not None
    assert compared.dense is not None
    assert compared.dense.top1 >= 0.95  # another resize of the same size rounds pixels differently
    assert artifact.verify()
    assert type(artifact.load("torch")) is transformers.ViTForImageClassification


@pytest.mark.parametrize(
    ("name", "masked"),
    [
        pytest.param("SwinForImageClassification", 8, marks=pytest.mark.slow),
        pytest.param("SegformerForSemanticSegmentation", 8, marks=pytest.mark.slow),
        pytest.param("Dinov2ForImageClassification", 8, marks=pytest.mark.slow),
        pytest.param("ConvNextV2ForImageClassification", 8, marks=pytest.mark.slow),
        pytest.param("CLIPVisionModelWithProjection", 8, marks=pytest.mark.slow),
        pytest.param("SiglipVisionModel", 8, marks=pytest.mark.slow),
    ],
)
def test_each_kind_of_model(tmp_path: Path, name: str, masked: int) -> None:
    """Masks, a refit on images, ONNX, and the original class with the compressed weights."""
    module = hugging_face(name)
    folder = saved(tmp_path / "model", module)
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for index in range(48):
        low = rng.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(low).resize((32, 32), Image.Resampling.BICUBIC).save(tmp_path / "images" / f"{index}.png")
    artifact = mpcompile.compile(folder, QUICK, data=tmp_path / "images", output=tmp_path / "out")
    assert len(artifact.verify()) >= masked
    again = artifact.load("torch")
    assert type(again) is type(module)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        outputs = again(images)
        before = module(images)
    assert outputs.keys() == before.keys()
    assert not torch.equal(outputs[0], before[0])  # masked
    original, compressed = module.state_dict(), again.state_dict()
    assert compressed.keys() == original.keys()
    assert all(compressed[key].any() for key, value in original.items() if value.any())
