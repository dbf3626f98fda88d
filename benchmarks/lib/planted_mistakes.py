"""200 mistakes of preprocessing, labels and weights for each of two models, and 50 right set-ups.

A mistake is made where a user makes it: in the options of the preprocessing, in the index of each class folder, in the
files of the images, or in the file of the weights.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpcompile.data.images import MODES
from mpcompile.ir.source import Source
from mpcompile.measure.preprocessing_set_ups import PIXEL_VALUES

RIGHT, LABELS, VALUES = "right", "labels permuted", "mean and deviation"
FEWEST = 100  # images of a right set-up
MOST = 300  # images of a mistake; of wrong labels all held-out images
Weights = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Planted:
    """A set-up of a model and images.

    `order` has the label that is given to the images of each class. `alter` changes the pictures before they are
    preprocessed. `weights` are those of the file. `chosen` are positions of images; None stands for all held-out ones.
    `claimed` says whether the checkpoint records the right model's accuracy.
    """

    kind: str
    detail: str
    source: Source
    order: NDArray[np.int64] | None = None
    alter: Callable[[Any], Any] | None = None
    weights: Weights | None = None
    chosen: NDArray[np.int64] | None = None
    claimed: bool = False


def right_set_ups(source: Source, held_out: NDArray[np.int64], rng: np.random.Generator) -> Iterator[Planted]:
    """50 right set-ups: random subsets of the images; half of them with a checkpoint that records its accuracy."""
    most = len(held_out) if source.size[0] == 1 else MOST
    for number in range(50):
        chosen = rng.permutation(held_out)[: int(rng.integers(FEWEST, most + 1))]
        detail = f"{len(chosen)} images"
        yield Planted(kind=RIGHT, detail=detail, source=source, chosen=np.sort(chosen), claimed=number % 2 == 1)


def mistakes_of(
    module: nn.Module, source: Source, held_out: NDArray[np.int64], rng: np.random.Generator
) -> list[Planted]:
    """The 200 mistakes for a model of 3 channels, or of 1 channel, on these held-out images."""
    classes, colored = _classes(module, source), source.size[0] == 3
    shifts = range(1, classes) if classes <= 10 else rng.choice(np.arange(1, classes), 20, replace=False)
    shifted = ((np.arange(classes) + int(n)) % classes for n in shifts)
    labels = [
        *_labels("labels shifted", source, shifted, "all by {}", shifts),
        *_moved(source, classes, 24, rng),
        *_partly_permuted(source, classes, 24, rng),
    ]
    others = [
        *_values(source, 20 if colored else 44, rng),
        *(_reversed_channels(source, held_out, 8, rng) if colored else ()),
        *_crops(source, 6 if colored else 30, rng),
        *(_input_sizes(source, 2, rng) if colored else ()),
        *_altered(source, 1 if colored else 4, rng),
        *(() if colored else _inverted(source, 1)),
        *_checkpoints(module, source, 5 if colored else 20, rng),
    ]
    some = np.sort(rng.permutation(held_out)[:MOST])
    drawn = [row if row.chosen is not None else replace(row, chosen=some) for row in others]
    permuted = _permuted(source, classes, 200 - len(labels) - len(others), rng)
    return [*permuted, *labels, *drawn]


def _classes(module: nn.Module, source: Source) -> int:
    with torch.no_grad():
        return int(module(torch.zeros(1, *source.size)).shape[1])


def _labels(
    kind: str, source: Source, orders: Iterator[NDArray[np.int64]], detail: str, values: Any
) -> Iterator[Planted]:
    for value, order in zip(values, orders, strict=True):
        yield Planted(kind=kind, detail=detail.format(value), source=source, order=order)


def _permuted(source: Source, classes: int, count: int, rng: np.random.Generator) -> Iterator[Planted]:
    orders = (rng.permutation(classes) for _ in range(count))
    return _labels(LABELS, source, orders, "all, number {}", range(1, count + 1))


def _moved(source: Source, classes: int, count: int, rng: np.random.Generator) -> Iterator[Planted]:
    """A folder too many or too few: the indices of all folders after it are moved by 1."""
    for _ in range(count):
        first, step = int(rng.integers(0, classes - 1)), int(rng.choice([-1, 1]))
        order = np.arange(classes)
        order[first:] = (order[first:] + step) % classes
        detail = f"by {step:+d} from class {first} on"
        yield Planted(kind="labels moved from a class on", detail=detail, source=source, order=order)


def _partly_permuted(source: Source, classes: int, count: int, rng: np.random.Generator) -> Iterator[Planted]:
    for _ in range(count):
        some = rng.choice(classes, int(rng.integers(2, classes)), replace=False)
        order = np.arange(classes)
        order[some] = rng.permutation(some)
        while (order[some] == some).all():
            order[some] = rng.permutation(some)
        detail = f"{len(some)} of {classes} classes"
        yield Planted(kind="labels of some classes permuted", detail=detail, source=source, order=order)


def _random_values(source: Source, rng: np.random.Generator) -> Source:
    """A random mean and deviation: the same for all channels, or one for each."""
    size = 1 if rng.random() < 0.5 else source.size[0]
    mean, std = rng.uniform(-0.2, 1, size), np.exp(rng.uniform(np.log(0.05), np.log(2), size))
    channels = source.size[0] // size
    return replace(source, mean=tuple(np.tile(mean, channels).tolist()), std=tuple(np.tile(std, channels).tolist()))


def _values(source: Source, count: int, rng: np.random.Generator) -> Iterator[Planted]:
    for _ in range(count):
        wrong = _random_values(source, rng)
        detail = "; ".join(f"{name} {' '.join(f'{v:.3g}' for v in getattr(wrong, name))}" for name in ("mean", "std"))
        yield Planted(kind=VALUES, detail=detail, source=wrong)


def _reversed_channels(
    source: Source, images: NDArray[np.int64], count: int, rng: np.random.Generator
) -> Iterator[Planted]:
    """BGR: half with the right mean and deviation, half with those of another training; each on other images."""
    for number in range(count):
        name, mean, std = ("the right values", source.mean, source.std)
        if number % 2:
            name, mean, std = PIXEL_VALUES[number // 2 % 4]  # type: ignore[assignment]
        wrong = replace(source, mean=mean[::-1], std=std[::-1], channel_order="bgr")
        chosen = np.sort(rng.permutation(images)[:MOST])
        yield Planted(kind="BGR", detail=f"with {name}", source=wrong, chosen=chosen)


def _crops(source: Source, count: int, rng: np.random.Generator) -> Iterator[Planted]:
    """Options of resize, crop and interpolation; the crop of the training is source.crop_pct."""
    height, width = source.size[1:]
    for number in range(count):
        interpolation = str(rng.choice(["nearest", "bilinear", "bicubic"]))
        way = ("crop", "resize", "sides")[number % 3]
        if way == "crop":
            asked: dict[str, Any] = {"crop_pct": float(rng.uniform(0.35, 0.8))}
        elif way == "resize":
            asked = {"resize": (int(rng.uniform(1.3, 2.5) * height),)}
        else:
            asked = {"resize": (int(rng.uniform(1, 2) * height), int(rng.uniform(1, 2) * width))}
        detail = ", ".join(f"{name} {value}" for name, value in asked.items())
        wrong = replace(source, interpolation=interpolation, **asked)
        yield Planted(kind="resize and crop", detail=f"{detail}, {interpolation}", source=wrong)


def _input_sizes(source: Source, count: int, rng: np.random.Generator) -> Iterator[Planted]:
    """Another --input-size than that of the training."""
    for side in rng.choice([96, 112, 128, 144, 160, 192], count, replace=False).tolist():
        wrong = replace(source, size=(source.size[0], side, side))
        yield Planted(kind="input size", detail=f"{side}x{side}", source=wrong)


def _altered(source: Source, count: int, rng: np.random.Generator) -> Iterator[Planted]:
    """Image files that lost their resolution, or whose orientation is ignored."""
    for _ in range(count):
        side = int(source.size[1] * rng.uniform(0.2, 0.7))
        yield Planted(kind="resolution lost", detail=f"short side {side}", source=source, alter=_Shrunk(side))
    for number in range(count):
        turns = 1 + number % 3
        yield Planted(kind="turned", detail=f"by {90 * turns} degrees", source=source, alter=_Turned(turns))


def _inverted(source: Source, count: int) -> Iterator[Planted]:
    for _ in range(count):
        yield Planted(kind="inverted", detail="grey values", source=source, alter=_negative)


@dataclass(frozen=True)
class _Shrunk:
    """A picture whose shorter side had `side` pixels for a while."""

    side: int

    def __call__(self, picture: Any) -> Any:
        scale = self.side / min(picture.size)
        small = picture.resize([max(1, round(length * scale)) for length in picture.size])
        return small.resize(picture.size)


@dataclass(frozen=True)
class _Turned:
    """A picture turned by quarters."""

    quarters: int

    def __call__(self, picture: Any) -> Any:
        return picture.rotate(90 * self.quarters, expand=True)


def _negative(picture: Any) -> Any:
    assert picture.mode == MODES[1]
    return picture.point(lambda value: 255 - value)


def _checkpoints(module: nn.Module, source: Source, count: int, rng: np.random.Generator) -> Iterator[Planted]:
    """Weights that are not the model's: untrained ones, and files that fit in part; half record the accuracy."""
    state = {name: value.clone() for name, value in module.state_dict().items()}
    names = [name for name, value in state.items() if value.is_floating_point() and value.ndim > 1]
    for number in range(count):
        claimed = number % 2 == 1
        kind = "other weights, accuracy recorded" if claimed else "other weights"
        share = 1.0 if number < 0.3 * count else float(rng.uniform(0.02, 0.5))
        wrong = set(rng.choice(names, max(1, round(share * len(names))), replace=False).tolist())
        weights = {name: _untrained(value, rng) if name in wrong else value for name, value in state.items()}
        detail = f"{len(wrong)} of {len(names)} weight matrices untrained"
        yield Planted(kind=kind, detail=detail, source=source, weights=weights, claimed=claimed)


def _untrained(value: Tensor, rng: np.random.Generator) -> Tensor:
    """Random weights of the same mean and deviation."""
    noise = torch.from_numpy(rng.standard_normal(tuple(value.shape))).to(value.dtype)
    return noise * value.std() + value.mean()
