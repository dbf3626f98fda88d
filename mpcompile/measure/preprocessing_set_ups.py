"""The usual preprocessings of images, as set-ups to try on a model, and the options that give each of them.

There are two lists: pixel values (mean, deviation, channel order) with a given resize and crop; and resize, crop and
interpolation with given pixel values. A search tries the first list, then the second one with the best of the first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mpcompile.data.encoded_images import EncodedImages
from mpcompile.data.images import Images
from mpcompile.data.transform import evaluation_transform
from mpcompile.frontend.preprocessing import per_channel
from mpcompile.frontend.presets import PRESETS
from mpcompile.ir.source import Source

IMAGENET = PRESETS["imagenet"]
# Name, mean and deviation for pixels in [0, 1]. A deviation of 1/255 gives the model pixels in [0, 255].
PIXEL_VALUES = (
    ("ImageNet", IMAGENET.mean, IMAGENET.std),
    ("CIFAR-10", PRESETS["cifar10"].mean, PRESETS["cifar10"].std),
    ("CLIP", PRESETS["clip"].mean, PRESETS["clip"].std),
    ("0.5 / 0.5", (0.5,) * 3, (0.5,) * 3),
    ("[0, 1]", (0.0,) * 3, (1.0,) * 3),
    ("[0, 255]", (0.0,) * 3, (0.00392157,) * 3),
    ("[0, 255] less ImageNet's mean", IMAGENET.mean, (0.00392157,) * 3),
)
CROPS = (1.0, 0.95, 0.875)
INTERPOLATIONS = ("bilinear", "bicubic")
SMALLEST_STD = 1e-3  # of images of one colour


@dataclass(frozen=True, slots=True, eq=False)
class SetUp:
    """A preprocessing to try, as a Source, and its name. Compared by identity: a Source has no hash."""

    name: str
    source: Source


def pixel_set_ups(present: Source, images: Tensor | None = None) -> tuple[SetUp, ...]:
    """The present preprocessing, then the usual means and deviations, each in RGB and in BGR; none twice.

    `images` (b, c, h, w) have the present preprocessing; if they are given, their own mean and deviation are tried too.
    """
    channels = present.size[0]
    usual = [
        SetUp(name, replace(present, mean=per_channel(mean, channels), std=per_channel(std, channels)))
        for name, mean, std in PIXEL_VALUES
        if mean is not None and std is not None
    ]
    if images is not None:
        usual.append(SetUp("the mean and deviation of these images", _with_own_values(present, images)))
    rows = [SetUp(_name_of(present), present)]
    others = [replace(row, source=replace(row.source, channel_order="rgb")) for row in usual]
    if channels == 3:  # few changes first: of equally good set-ups the first one is taken
        rows += map(_with_other_order, tuple(rows))
        others += map(_with_other_order, tuple(others))
    return _distinct([*rows, *others])


def crop_set_ups(best: SetUp) -> tuple[SetUp, ...]:
    """The other usual ways to resize, crop and interpolate, with the pixel values of the best set-up."""
    source = best.source
    cropped = replace(source, resize=None, keep_exact=False)
    rows = [
        *(SetUp(f"{best.name}, {_crop_name(crop)}", replace(cropped, crop_pct=crop)) for crop in CROPS),
        SetUp(f"{best.name}, both sides resized", replace(cropped, resize=source.size[1:])),
        *(SetUp(f"{best.name}, {name}", replace(source, interpolation=name)) for name in INTERPOLATIONS),
    ]
    return tuple(row for row in _distinct([best, *rows]) if row.source != source)


def unlike(set_ups: Sequence[SetUp], least: float) -> tuple[SetUp, ...]:
    """The set-ups, of one resize and crop, without those whose pixel values are much like those of an earlier one.

    Values differ by the change of the mean relative to the deviation, or by that of the deviation relative to itself.
    """
    kept: list[SetUp] = []
    for row in set_ups:
        if all(_distance(row.source, one.source) >= least for one in kept):
            kept.append(row)
    return tuple(kept)


def readers(
    images: Images, present: Source
) -> tuple[Callable[[int], tuple[Any, Any]], Callable[[Any], Tensor], Callable[[Source], Callable[[Any], Tensor]]]:
    """Three functions: reads a picture and its label; preprocesses it as the set does; and as another source says.

    A picture is read once for all set-ups. For files it is a PIL image. For other sets it is the preprocessed tensor,
    from which only the pixel values of another source can be made, and not its resize and crop.
    """
    if isinstance(images, EncodedImages):
        return images.picture, images.transform, evaluation_transform
    return images.__getitem__, _unchanged, lambda source: partial(_with_values, present=present, source=source)


def has_picture_files(images: Images) -> bool:
    """Whether the pictures can be resized and cropped in another way."""
    return isinstance(images, EncodedImages)


def unnormalized(images: Tensor, present: Source) -> Tensor:
    """Pixels in [0, 1] of images (..., c, h, w) with the present mean and deviation."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (present.mean, present.std))
    return images * std + mean


def options_for(source: Source, present: Source) -> str:
    """The options that change the preprocessing of one source into that of another; empty if there is no difference."""
    options = [
        f"--{name} {','.join(f'{value:.9g}' for value in getattr(source, name))}"
        for name in ("mean", "std")
        if getattr(source, name) != getattr(present, name)
    ]
    if source.channel_order != present.channel_order:
        options.append(f"--channel-order {source.channel_order}")
    if source.resize is not None and source.resize != present.resize:
        options.append(f"--resize {'x'.join(map(str, source.resize))}")
    elif source.resize is None and (
        (source.crop_pct, source.keep_exact) != (present.crop_pct, present.keep_exact) or present.resize is not None
    ):
        options.append(f"--crop-pct {source.crop_pct:g}")
    if source.interpolation != present.interpolation:
        options.append(f"--interpolation {source.interpolation}")
    return " ".join(options)


def _with_own_values(present: Source, images: Tensor) -> Source:
    """The source with the images' own mean and deviation, to 4 digits: they are estimates."""
    pixels = unnormalized(images, present).double()
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3)).clamp(min=SMALLEST_STD)
    return replace(present, mean=_rounded(mean), std=_rounded(std))


def _rounded(values: Tensor) -> tuple[float, ...]:
    return tuple(float(f"{value:.4g}") for value in values.tolist())


def _unchanged(image: Tensor) -> Tensor:
    return image


def _with_values(image: Tensor, present: Source, source: Source) -> Tensor:
    """A preprocessed image (c, h, w) with another mean, deviation and channel order."""
    pixels = unnormalized(image, present)
    pixels = pixels.flip(0) if source.channel_order != present.channel_order else pixels
    mean, std = (torch.tensor(values)[:, None, None] for values in (source.mean, source.std))
    return (pixels - mean) / std


def _name_of(present: Source) -> str:
    names = {"architecture": "assumed (the architecture's)", "assumed": "assumed (ImageNet's)", "recorded": "recorded"}
    return f"present: {names.get(present.preprocessing, present.preprocessing)}"


def _crop_name(crop: float) -> str:
    return "no crop" if crop == 1 else f"crop {crop:g}"


def _other(source: Source) -> str:
    return "bgr" if source.channel_order == "rgb" else "rgb"


def _with_other_order(row: SetUp) -> SetUp:
    """The set-up with the other channel order; mean and deviation stay with their colours."""
    source, order = row.source, _other(row.source)
    reversed_source = replace(source, channel_order=order, mean=source.mean[::-1], std=source.std[::-1])
    return SetUp(f"{row.name}, {order.upper()}", reversed_source)


def _distance(one: Source, other: Source) -> float:
    """How much the pixel values of two sources differ; infinite for another channel order."""
    if one.channel_order != other.channel_order:
        return float("inf")
    means = max(abs(a - b) for a, b in zip(one.mean, other.mean, strict=True)) / min(*one.std, *other.std)
    return max(means, *(abs(a / b - 1) for a, b in zip(one.std, other.std, strict=True)))


def _distinct(rows: list[SetUp]) -> tuple[SetUp, ...]:
    """The set-ups without those whose source came before."""
    return tuple(row for i, row in enumerate(rows) if all(row.source != one.source for one in rows[:i]))
