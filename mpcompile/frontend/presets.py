"""Preprocessing by name: `imagenet`, `cifar10`, `clip`, `dinov2`, `torchvision:WEIGHTS`, or a JSON file.

Presets give no input size, except files and torchvision's weights, which state one.
"""

from collections.abc import Mapping
from pathlib import Path

from mpcompile.errors import UsageError, first_line
from mpcompile.frontend.preprocessing import Preprocessing
from mpcompile.frontend.preset_file import read_preset

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PRESETS: Mapping[str, Preprocessing] = {
    # timm's evaluation by default. torchvision's resizes to other sizes, bilinear: torchvision:WEIGHTS.
    "imagenet": Preprocessing(None, *IMAGENET, "bicubic", 0.875, "center"),
    # Mean and deviation of the training pixels. Images have the input's size.
    "cifar10": Preprocessing(None, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "bilinear", 1.0, "center"),
    # openai/CLIP, clip.py: resize to the input's size, crop the centre.
    "clip": Preprocessing(
        None, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), "bicubic", 1.0, "center"
    ),
    # facebookresearch/dinov2, dinov2/data/transforms.py: resize to 256 for 224, bicubic.
    "dinov2": Preprocessing(None, *IMAGENET, "bicubic", 0.875, "center"),
}


def preset_named(name: str, sized: bool = False) -> Preprocessing:
    """The preprocessing that `--preprocess` names. Raises UsageError if there is none of that name.

    `sized`: whether the size of the images is given, for a file that keeps their ratio.
    """
    if name in PRESETS:
        return PRESETS[name]
    if name.startswith("torchvision:"):
        return _of_torchvision(name.removeprefix("torchvision:"))
    if name.endswith(".json") or Path(name).name != name:
        return read_preset(Path(name), sized)
    raise UsageError(
        f"--preprocess {name!r} is unknown; give {', '.join(PRESETS)}, a .json file, or torchvision:WEIGHTS such as "
        "torchvision:ResNet50_Weights.IMAGENET1K_V2"
    )


def _of_torchvision(weights: str) -> Preprocessing:
    """The preprocessing in the metadata of torchvision's weights; nothing is downloaded. Raises UsageError."""
    import torchvision

    example = "give for example torchvision:ResNet50_Weights.IMAGENET1K_V2"
    try:
        transform = torchvision.models.get_weight(weights).transforms()
    except Exception as error:  # ValueError, AttributeError, KeyError: it looks the name up in several tables
        raise UsageError(f"torchvision has no weights {weights!r} ({first_line(error)}); {example}") from error
    names = ("crop_size", "resize_size", "mean", "std", "interpolation")
    if not all(hasattr(transform, name) for name in names):
        raise UsageError(f"torchvision's {weights} are not weights of an image classifier; {example}")
    side = transform.crop_size[0]
    return Preprocessing(
        size=(3, side, side),
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        interpolation=transform.interpolation.value,
        resize=tuple(transform.resize_size),
        channel_order="rgb",
    )
