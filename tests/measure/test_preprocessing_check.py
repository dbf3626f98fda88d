"""The preprocessing check names the right values, and raises no alarm for a model that is preprocessed rightly."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mpcompile.data.folder import FolderImages
from mpcompile.data.images import Split
from mpcompile.data.loading import load_data
from mpcompile.data.transform import evaluation_transform
from mpcompile.ir.head import Head
from mpcompile.ir.source import Source
from mpcompile.measure.checked_comparison import checked_comparison
from mpcompile.measure.preprocessing_check import better_preprocessing
from mpcompile.measure.preprocessing_set_ups import pixel_set_ups
from mpcompile.system.progress import listening

MEAN, STD = (0.3, 0.5, 0.6), (0.2, 0.25, 0.3)


@dataclass(frozen=True)
class Colours:
    """Images of one of 4 colours with noise, preprocessed with a mean and a deviation."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    reverse: bool = False
    classes: int = 4

    def __len__(self) -> int:
        return 256

    def pixels(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        colour = torch.tensor([[0.2, 0.3, 0.5], [0.2, 0.7, 0.7], [0.5, 0.3, 0.8], [0.3, 0.7, 0.4]])[index % 4]
        return (colour[:, None, None] + 0.1 * torch.randn(3, 4, 4, generator=generator)).clamp(0, 1)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = self.pixels(index).flip(0) if self.reverse else self.pixels(index)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels - mean) / std, index % 4


def model(mean: tuple[float, ...], std: tuple[float, ...]) -> Any:
    """The nearest colour after preprocessing with these values."""
    images = Colours(mean, std)
    samples = torch.stack([torch.stack([images[i + 4 * n][0] for n in range(16)]) for i in range(4)])
    centres = samples.mean((1, 3, 4)).numpy()

    def run(pixels: np.ndarray) -> np.ndarray:
        means = pixels.mean(axis=(2, 3))
        return -np.square(means[:, None] - centres).sum(axis=2)  # type: ignore[no-any-return]

    return run


def found(trained: Any, images: Colours) -> str | None:
    return better_preprocessing(
        trained, Split(images, tuple(range(256)), True), source(images.mean, images.std), Head()
    )


def source(mean: tuple[float, ...], std: tuple[float, ...]) -> Source:
    return Source(name="m", sha256="", arch="m", size=(3, 4, 4), mean=mean, std=std)


def test_the_right_preprocessing_raises_no_alarm() -> None:
    assert found(model(MEAN, STD), Colours(MEAN, STD)) is None
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert found(model(*imagenet), Colours(*imagenet)) is None


@pytest.mark.parametrize(
    ("trained", "name"),
    [
        (((0.0,) * 3, (1.0,) * 3), "Give --mean"),
        (((0.0,) * 3, (1 / 255,) * 3), "[0, 255]: "),
        (((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), "ImageNet: "),
    ],
)
def test_a_wrong_mean_and_deviation_are_noticed(trained: tuple[Any, Any], name: str) -> None:
    text = found(model(*trained), Colours((0.9, 0.9, 0.9), (0.5, 0.5, 0.5)))
    assert text is not None
    assert name in text
    assert "the preprocessing is not the one of its training" in text


def test_reversed_channels_are_noticed() -> None:
    text = found(model(MEAN, STD), Colours(MEAN, STD, reverse=True))
    assert text is not None
    assert "and on " in text
    assert "BGR" in text


def test_its_progress_names_the_images_and_the_preprocessing() -> None:
    """It takes minutes for a large model on a CPU."""
    heard: list[str] = []
    with listening(lambda step, done, total: heard.append(step)):
        found(model(MEAN, STD), Colours(MEAN, STD))
    assert heard[0] == "the first 16 images"
    assert {"the first 64 images", pixel_set_ups(source(MEAN, STD))[0].name} <= set(heard)
    assert any("BGR" in step for step in heard)


def test_images_that_were_preprocessed_otherwise_are_left_alone() -> None:
    images = Colours(MEAN, STD)
    split = Split(images, tuple(range(64)), True)
    assert better_preprocessing(model(MEAN, STD), split, source((5.0,) * 3, (1.0,) * 3), Head()) is None


SIDE, CLASSES, EACH = 8, 5, 60


def pictures() -> tuple[np.ndarray, np.ndarray]:
    """Pictures of 16 × 16 pixels, whose class is the colour of their left edge, in noise; and labels."""
    rng = np.random.default_rng(0)
    colors = np.array([[200, 90, 60], [60, 200, 90], [90, 60, 200], [200, 200, 60], [60, 90, 90]])
    labels = np.repeat(np.arange(CLASSES), EACH)
    images = rng.normal(128, 40, (len(labels), 2 * SIDE, 2 * SIDE, 3))
    images[:, :, :4] += 0.6 * (colors[labels] - 128)[:, None, None]
    return images.clip(0, 255).astype(np.uint8), labels


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> FolderImages:
    """The pictures in class folders, with the right preprocessing."""
    root = tmp_path_factory.mktemp("pictures")
    for index, (image, label) in enumerate(zip(*pictures(), strict=True)):
        (root / str(label)).mkdir(exist_ok=True)
        Image.fromarray(image).save(root / str(label) / f"{index}.png")
    images = load_data(root, RIGHT, CLASSES, calibration=1, validation=0).held_out.images
    assert isinstance(images, FolderImages)
    return images


RIGHT = Source(
    name="m", sha256="", arch="m", size=(3, SIDE, SIDE), mean=MEAN, std=STD, crop_pct=1.0, interpolation="bilinear"
)


@pytest.fixture(scope="module")
def probe(files: FolderImages) -> Any:
    """The least-squares classifier of the rightly preprocessed pictures."""
    x = np.stack([files[index][0].numpy().ravel() for index in range(len(files))]).astype(np.float64)
    x = np.hstack([x, np.ones((len(x), 1))])
    gram = x.T @ x + 0.1 * len(x) * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, x.T @ np.eye(CLASSES)[list(files.labels)])

    def run(batch: np.ndarray) -> np.ndarray:
        flat = batch.reshape(len(batch), -1)
        return (flat @ weights[:-1] + weights[-1]).astype(np.float32)  # type: ignore[no-any-return]

    return run


def checked(probe: Any, files: FolderImages, source: Source) -> str | None:
    """The check of the pictures with the preprocessing of a source."""
    images = replace(files, transform=evaluation_transform(source))
    return better_preprocessing(probe, Split(images, tuple(range(len(images))), True), source, Head())


def test_files_that_are_preprocessed_rightly_raise_no_alarm(probe: Any, files: FolderImages) -> None:
    assert checked(probe, files, RIGHT) is None


@pytest.mark.parametrize(
    ("wrong", "name", "options"),
    [
        ({"crop_pct": 0.5}, "no crop", "--crop-pct 1"),
        ({"crop_pct": 0.5, "interpolation": "nearest"}, "no crop", "--crop-pct 1"),
        ({"resize": (24,)}, "no crop", "--crop-pct 1"),
        ({"mean": MEAN[::-1], "std": STD[::-1], "channel_order": "bgr"}, "RGB", "--channel-order rgb"),
    ],
    ids=["crop", "crop and interpolation", "resize", "channel order"],
)
def test_wrong_options_of_files_are_noticed(
    probe: Any, files: FolderImages, wrong: dict[str, Any], name: str, options: str
) -> None:
    text = checked(probe, files, replace(RIGHT, **wrong))
    assert text is not None
    assert f"another usual one, {name}: the preprocessing is not the one of its training" in text
    assert options in text


def test_the_first_images_of_the_check_are_of_all_classes(files: FolderImages) -> None:
    seen: list[int] = []
    order = tuple(range(len(files)))
    labels = {files[index][0].numpy().tobytes(): files.labels[index] for index in order}

    def run(batch: np.ndarray) -> np.ndarray:
        seen.extend(labels.get(image.tobytes(), -1) for image in batch)
        return np.eye(CLASSES, dtype=np.float32)[[0] * len(batch)]

    better_preprocessing(run, Split(files, order, True), RIGHT, Head())
    assert len(set(seen[:16])) == CLASSES


def test_a_set_up_that_falls_behind_is_not_run_on_all_images(probe: Any, files: FolderImages) -> None:
    calls = 0

    def run(batch: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += len(batch)
        return probe(batch)  # type: ignore[no-any-return]

    assert checked(run, files, RIGHT) is None
    every = len(pixel_set_ups(RIGHT)) * len(files)
    assert calls < 0.7 * every


def test_the_comparison_of_compile_has_the_reason_and_tries_nothing_without_labels(
    probe: Any, files: FolderImages
) -> None:
    wrong = replace(RIGHT, crop_pct=0.5)
    images = replace(files, transform=evaluation_transform(wrong))
    split = Split(images, tuple(range(len(images))), labelled=True)
    check = checked_comparison(probe, probe, split, wrong, None, None).dense_check
    assert check is not None
    assert "no crop: the preprocessing is not the one of its training" in check.reasons[0]
    check = checked_comparison(probe, probe, replace(split, labelled=False), wrong, None, None).dense_check
    assert check is not None
    assert check.reasons == ()
