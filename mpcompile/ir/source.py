"""The source of a model: where its weights came from, and the preprocessing of its input."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model came from, and its input preprocessing.

    `name` is the path or name that the user gave, or the class name if a module was passed. `sha256` is the hash of the
    weights file, or of the state dict if there is no file. `arch` is a timm name, `pkg.mod:factory`, or the class name
    if a module was passed. `size` is (channels, height, width). `mean` and `std` are per channel, for pixels in [0, 1].
    `interpolation`, `crop_pct` and `crop_mode` are those of timm's evaluation transform. `labels` are the class names;
    empty if unknown.
    `mean` and `std` are in the order of channels that the model takes. `preprocessing` says where the values come from:
    "recorded" in the model, "assumed" (ImageNet's), "architecture" (timm's configuration of `arch`, where the weights
    come from another file), or the value of --preprocess.
    """

    name: str
    sha256: str
    arch: str
    size: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"
    labels: tuple[str, ...] = ()
    arch_args: Mapping[str, Any] | None = None  # arguments that `arch` was built with; None if it cannot be rebuilt
    resize: tuple[int, ...] | None = None  # pixels of the shorter side, or (height, width); replaces crop_pct
    keep_exact: bool = False  # whether images that already have the input's size are neither resized nor cropped
    channel_order: str = "rgb"  # or "bgr"
    preprocessing: str = "recorded"
    assumed: tuple[str, ...] = ()  # fields that are neither recorded nor given
