"""`mpcompile doctor MODEL --data`: a linear probe whose preprocessing is known by construction."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commandline import mpcompile
from PIL import Image
from torch import Tensor, nn

from mpcompile.driver.preprocessing_trials import conclude, try_preprocessings
from mpcompile.errors import LoadError, UsageError
from mpcompile.frontend.load_model import Request, load
from mpcompile.ir.source import Source
from mpcompile.measure.preprocessing_set_ups import SetUp, crop_set_ups, options_for, pixel_set_ups

SIDE, CLASSES, EACH = 8, 5, 24
PRESENT = Source(name="m", sha256="", arch="m", size=(3, SIDE, SIDE), keep_exact=True, assumed=("crop_pct",))


class Probe(nn.Module):
    """A linear classifier of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * SIDE * SIDE, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x.flatten(1))
        return logits


def pixels() -> tuple[np.ndarray, np.ndarray]:
    """Images of colours that stand for their class, in noise, and labels."""
    rng = np.random.default_rng(0)
    colours = np.array([[90, 90, 200], [120, 90, 170], [150, 90, 140], [180, 90, 110], [210, 90, 80]])
    labels = np.repeat(np.arange(CLASSES), EACH)
    images = colours[labels][:, None, None] + rng.normal(0, 20, (len(labels), SIDE, SIDE, 3))
    return images.clip(0, 255).astype(np.uint8), labels


def probe(source: Source) -> Probe:
    """The least-squares probe for images that are preprocessed as the source says."""
    images, labels = pixels()
    x = torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255
    x = x.flip(1) if source.channel_order == "bgr" else x
    x = (x - torch.tensor(source.mean)[:, None, None]) / torch.tensor(source.std)[:, None, None]
    x = torch.cat([x.flatten(1), torch.ones(len(x), 1)], dim=1)
    scale = x.square().mean()
    gram = x.T @ x + scale * torch.eye(x.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, x.T @ torch.eye(CLASSES, dtype=torch.float64)[labels])
    model = Probe()
    model.head.weight.data, model.head.bias.data = weights[:-1].T.float().contiguous(), weights[-1].float()
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for index, (image, label) in enumerate(zip(*pixels(), strict=True)):
        (root / str(label)).mkdir(exist_ok=True)
        Image.fromarray(image).save(root / str(label) / f"{index}.png")
    return root


@pytest.mark.parametrize(
    ("trained", "name", "option"),
    [
        (replace(PRESENT, mean=(0.0,) * 3, std=(0.00392157,) * 3), "[0, 255]", "--std 0.00392157"),
        (
            replace(PRESENT, mean=PRESENT.mean[::-1], std=PRESENT.std[::-1], channel_order="bgr"),
            "present: recorded, BGR",
            "--channel-order bgr",
        ),
    ],
    ids=["pixels in [0, 255]", "BGR"],
)
def test_the_preprocessing_of_the_training_is_found(folder: Path, trained: Source, name: str, option: str) -> None:
    model = probe(trained)
    model.pretrained_cfg = {  # type: ignore[assignment]
        "input_size": PRESENT.size, "mean": PRESENT.mean, "std": PRESENT.std, "crop_pct": 1.0,
        "interpolation": "bicubic",
    }  # fmt: skip
    found = try_preprocessings(model, folder)
    by_name = {trial.name: trial for trial in found.trials}
    assert by_name[name].top1 > 0.95
    assert by_name["present: recorded"].top1 < 0.7
    assert by_name["present: recorded"].options == ""
    assert option in by_name[name].options
    assert "is significantly better than the present set-up" in found.conclusion
    assert [trial.top1 for trial in found.trials] == sorted((trial.top1 for trial in found.trials), reverse=True)


def test_the_options_give_the_set_up_that_was_tried() -> None:
    request = Request(f"{__name__}:Probe", input_size=(3, SIDE, SIDE))
    present = load(request).source
    for row in (*pixel_set_ups(present), *crop_set_ups(SetUp("best", present))):
        words = options_for(row.source, present).split()
        given = dict(zip(words[::2], words[1::2], strict=True))
        mean, std = (tuple(map(float, given[key].split(","))) if key in given else None for key in ("--mean", "--std"))
        resize = tuple(map(int, given["--resize"].split("x"))) if "--resize" in given else None
        crop_pct = float(given["--crop-pct"]) if "--crop-pct" in given else None
        asked = replace(request, mean=mean, std=std, resize=resize, crop_pct=crop_pct)
        asked = replace(asked, interpolation=given.get("--interpolation"), channel_order=given.get("--channel-order"))
        source = load(asked).source
        assert replace(source, sha256="", assumed=()) == replace(row.source, sha256="", assumed=())


def test_no_set_up_is_called_better_without_evidence() -> None:
    one, other = SetUp("present", PRESENT), SetUp("other", replace(PRESENT, channel_order="bgr"))
    right = np.arange(200) < 100
    close = np.arange(200) < 104
    found = conclude({one: right, other: close}, PRESENT, chance=0.1)
    assert [trial.name for trial in found.trials] == ["other", "present"]
    assert found.conclusion == "no set-up is significantly better than the present one on 200 images"
    clear = conclude({one: right, other: np.arange(200) < 150}, PRESENT, chance=0.1)
    assert clear.conclusion.endswith("give --channel-order bgr")
    chance = conclude({one: np.arange(200) < 20, other: np.arange(200) < 22}, PRESENT, chance=0.1)
    assert chance.conclusion.startswith("no set-up is better than chance on 200 images: are the labels in the model's")


def test_images_without_labels_are_refused(folder: Path) -> None:
    model = probe(PRESENT)
    model.pretrained_cfg = {"input_size": PRESENT.size}  # type: ignore[assignment]
    with pytest.raises(UsageError, match="doctor --data measures accuracy, which needs labelled images"):
        try_preprocessings(model, folder / "0")


def test_the_command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(probe(replace(PRESENT, mean=(0.0,) * 3, std=(1.0,) * 3)).state_dict(), tmp_path / "probe.pt")
    (tmp_path / "probe.py").write_text(
        "from torch import nn\n\ndef make():\n"
        f"    model = nn.Sequential(nn.Flatten())\n    model.head = nn.Linear({3 * SIDE * SIDE}, {CLASSES})\n"
        "    return model\n"
    )
    monkeypatch.chdir(tmp_path)
    words = ("doctor", "probe.pt", "--arch", "probe:make", "--input-size", f"3x{SIDE}x{SIDE}", "--data", str(folder))
    done = mpcompile(*words, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["images"] == CLASSES * EACH - 1  # one calibrates
    names = [row["name"] for row in found["trials"] if row["top1"] == found["trials"][0]["top1"]]
    assert "[0, 1]" in names
    assert "doctor tries preprocessings with a model and images; give both" in mpcompile("doctor", "probe.pt").stderr


class Bright(nn.Module):
    """Decides whether pixels in [-1, 1] are bright, by one logit or by one logit for each half of the image."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.head = nn.Linear(3 * SIDE * SIDE, outputs)
        half = 3 * SIDE * SIDE // outputs
        with torch.no_grad():
            self.head.bias.zero_()
            for index in range(outputs):
                self.head.weight[index] = 0
                self.head.weight[index, index * half : (index + 1) * half] = 1
        self.pretrained_cfg = {
            "input_size": PRESENT.size, "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0,
            "interpolation": "bicubic",
        }  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x.permute(0, 2, 3, 1).flatten(1))  # rows of the image are in order
        return logits


def bright_images(path: Path, labels: np.ndarray) -> None:
    """An .npz file: label 1 has pixels of 0.6, label 0 of 0.4; a row of labels is for the halves of the image."""
    levels = np.where(labels == 1, 153, 102).reshape(len(labels), -1)
    images = np.repeat(levels, SIDE // levels.shape[1], axis=1)[:, :, None, None] + np.zeros((1, 1, SIDE, 3))
    half = len(labels) // 2
    arrays: dict[str, Any] = {"images": images.astype(np.uint8), "labels": labels}
    np.savez(
        path,
        **{f"calibration_{name}": values[:half] for name, values in arrays.items()},
        **{f"heldout_{name}": values[half:] for name, values in arrays.items()},
    )


def test_one_logit_is_judged_at_its_threshold(tmp_path: Path) -> None:
    """The largest of one output is always class 0: every set-up had the share of that class."""
    bright_images(tmp_path / "a.npz", np.random.default_rng(0).integers(0, 2, 200))
    found = try_preprocessings(Bright(), tmp_path / "a.npz")
    by_name = {trial.name: trial.top1 for trial in found.trials}
    assert by_name["present: recorded"] == 1.0
    assert by_name["[0, 1]"] < 0.7  # every image is above 0
    assert found.measure == "accuracy"
    assert found.conclusion == "no set-up is significantly better than the present one on 100 images"
    assert any("whether it exceeds 0" in note for note in found.notes)


def test_several_labels_are_judged_together(tmp_path: Path) -> None:
    bright_images(tmp_path / "a.npz", np.random.default_rng(0).integers(0, 2, (200, 2)))
    found = try_preprocessings(Bright(2), tmp_path / "a.npz", head="multilabel")
    assert {trial.name: trial.top1 for trial in found.trials}["present: recorded"] == 1.0
    assert found.measure == "exact match"
    with pytest.raises(LoadError, match="several labels per image; give --head multilabel"):
        try_preprocessings(Bright(2), tmp_path / "a.npz")
    bright_images(tmp_path / "b.npz", np.random.default_rng(0).integers(0, 2, 200))
    with pytest.raises(UsageError, match="needs labelled images; .*one class each, and the head is multilabel"):
        try_preprocessings(Bright(2), tmp_path / "b.npz", head="multilabel")
    with pytest.raises(UsageError, match="the head sigmoid needs one output"):
        try_preprocessings(Bright(2), tmp_path / "a.npz", head="sigmoid")
