"""The notes on assumed preprocessing, and the preprocessing that an artifact's report keeps."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydantic import TypeAdapter
from torch import nn

from mpcompile.data.transform import evaluation_transform
from mpcompile.driver.inputs import data_for, loaded_from
from mpcompile.frontend.capture import capture
from mpcompile.frontend.load_model import Request
from mpcompile.ir.model import Model
from mpcompile.ir.source import Source
from mpcompile.ir.structure import structure_of
from mpcompile.recipe.schema import DataChoice


class Net(nn.Module):
    """A model that records no preprocessing."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 8 * 8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(x.flatten(1))
        return logits


def net(**options: object) -> Model:
    request = Request(f"{__name__}:Net", input_size=(3, 8, 8), **options)  # type: ignore[arg-type]
    loaded, _ = loaded_from(request)
    return capture(loaded.module, loaded.source)


def test_the_report_says_what_was_assumed(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    for name in ("a/0.png", "a/1.png", "b/2.png", "b/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / name)
    choice = DataChoice(calibration=1)
    [note] = [text for text in data_for(tmp_path, net(), choice).notes if "preprocessing" in text]
    assert note.startswith("preprocessing is not recorded in the model: assumed ImageNet's usual values, mean (0.485")
    assert "(images of 8x8 pixels are neither resized nor cropped)" in note
    assert not any("preprocessing" in text for text in data_for(tmp_path, net(preprocess="cifar10"), choice).notes)
    arrays = {f"{split}_images": image[None] for split in ("calibration", "heldout")}
    labels = {f"{split}_labels": np.array([0]) for split in ("calibration", "heldout")}
    np.savez(tmp_path / "images.npz", allow_pickle=True, **arrays, **labels)
    [note] = data_for(tmp_path / "images.npz", net(), choice).notes
    assert "deviation (0.229, 0.224, 0.225); give --preprocess" in note
    assert "crop_pct" not in note
    given = net(mean=(0.5,) * 3, std=(0.5,) * 3)
    assert data_for(tmp_path / "images.npz", given, choice).notes == ()


def test_a_report_keeps_the_preprocessing() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8))
    source = net(preprocess="clip", resize=(9, 11), channel_order="bgr", interpolation="lanczos").source
    kept = TypeAdapter(Source).validate_json(TypeAdapter(Source).dump_json(source))
    assert kept == source
    assert torch.equal(evaluation_transform(kept)(image), evaluation_transform(source)(image))


def test_preprocessing_is_part_of_the_fingerprint() -> None:
    torch.manual_seed(0)
    options: list[dict[str, object]] = [
        {},
        {"resize": (9,)},
        {"crop_pct": 0.875},
        {"channel_order": "bgr"},
        {"interpolation": "bilinear"},
    ]
    assert len({structure_of(net(**option)) for option in options}) == len(options)
