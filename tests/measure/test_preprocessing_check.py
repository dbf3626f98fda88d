"""The preprocessing check names the right values, and raises no alarm for a model that is preprocessed rightly."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mpcompile.data.images import Split
from mpcompile.ir.head import Head
from mpcompile.ir.model import Source
from mpcompile.measure.preprocessing_check import better_preprocessing

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


def test_images_that_were_preprocessed_otherwise_are_left_alone() -> None:
    images = Colours(MEAN, STD)
    split = Split(images, tuple(range(64)), True)
    assert better_preprocessing(model(MEAN, STD), split, source((5.0,) * 3, (1.0,) * 3), Head()) is None
