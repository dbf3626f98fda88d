"""The evaluation transform: resizing, cropping and normalisation of an image as the Source of a model says.

It is timm's, with three additions: a resize to a given number of pixels, images that stay as they are since they
already have the input's size, and models that take BGR.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mpcompile.errors import LoadError
from mpcompile.ir.model import INTERPOLATIONS
from mpcompile.ir.source import Source

Transform = Callable[[Any], Tensor]  # PIL image in RGB or grey -> float32 (c, h, w)


def evaluation_transform(source: Source) -> Transform:
    """The transform of an image before a model of this source takes it: PIL image -> float32 tensor (c, h, w).

    - With `resize`, the shorter side (one number) or height and width (two) get that many pixels.
    - Otherwise the image is resized to the input's size divided by `crop_pct`, as `crop_mode` says (timm's).
    - Then the centre is cropped, and pixels in [0, 1] become (pixel - mean) / std.

    With `keep_exact`, an image that already has the input's height and width is only normalised. Raises LoadError if
    the interpolation is unknown.
    """
    if source.interpolation not in INTERPOLATIONS:
        raise LoadError(
            f"the model's preprocessing names the interpolation {source.interpolation!r}, which PIL has not; give "
            f"--interpolation, one of {', '.join(INTERPOLATIONS)}"
        )
    return in_channel_order(source, _rgb_transform)


def in_channel_order(source: Source, build: Callable[[Source], Transform]) -> Transform:
    """The transform that `build` makes of a source for RGB, with its channels reversed if the model takes BGR.

    For BGR, `build` gets mean and deviation in the order of RGB.
    """
    if source.channel_order == "rgb":
        return build(source)
    return ReversedChannels(build(replace(source, mean=source.mean[::-1], std=source.std[::-1])))


@dataclass(frozen=True)
class ReversedChannels:
    """A transform followed by a reversal of the channels: RGB -> BGR."""

    transform: Transform

    def __call__(self, picture: Any) -> Tensor:
        return self.transform(picture).flip(0)


@dataclass(frozen=True)
class KeepExact:
    """`normalize` for an image of the size (height, width), `transform` for any other."""

    size: tuple[int, int]
    normalize: Transform
    transform: Transform

    def __call__(self, picture: Any) -> Tensor:
        from torchvision.transforms.functional import get_dimensions

        _, height, width = get_dimensions(picture)
        return (self.normalize if (height, width) == self.size else self.transform)(picture)


def _rgb_transform(source: Source) -> Transform:
    """The evaluation transform for a model that takes RGB or grey."""
    from timm.data import create_transform
    from timm.data.transforms import MaybeToTensor, str_to_interp_mode
    from torchvision import transforms

    size = source.size[1:]
    normalize = [MaybeToTensor(), transforms.Normalize(torch.tensor(source.mean), torch.tensor(source.std))]
    if source.resize is not None:
        resize = source.resize[0] if len(source.resize) == 1 else source.resize
        resized = transforms.Resize(resize, str_to_interp_mode(source.interpolation))
        whole: Transform = transforms.Compose([resized, transforms.CenterCrop(size), *normalize])
    else:
        whole = create_transform(
            source.size,
            is_training=False,
            interpolation=source.interpolation,
            mean=source.mean,
            std=source.std,
            crop_pct=source.crop_pct,
            crop_mode=source.crop_mode,
        )
    return KeepExact(size, transforms.Compose(normalize), whole) if source.keep_exact else whole
