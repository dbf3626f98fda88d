"""Whether a model of transformers gets the pixels that its own image processor would give it.

A `preprocessor_config.json` means what its class makes of it: LeViT's enlarges the size, EfficientNet's divides by the
deviation twice. Instead of trusting our reading of the file, one picture goes through both.
"""

import inspect
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpcompile.data.transform import evaluation_transform
from mpcompile.errors import LoadError
from mpcompile.ir.source import Source

log = logging.getLogger(__name__)

# Largest mean difference, as a share of the deviation of the pixels. On these waves, roundings of another resize and a
# crop that starts one pixel later stay below 0.02, and a wrong size or scale gives more than 0.1.
TOLERANCE = 0.05


def require_same_pixels(file: Path, source: Source) -> None:
    """Raises LoadError if the preprocessing of a source gives other pixels than the image processor of a file.

    A processor of no class in transformers, or that cannot be run, is not compared, and the log says so. Nor is one
    that keeps the ratio of images, which is told when the file is read.
    """
    if source.size[0] != 3 or source.crop_mode == "squash":
        return
    content = json.loads(file.read_text(encoding="utf-8"))
    content = content.get("image_processor") or content
    name = str(content.get("image_processor_type") or content.get("feature_extractor_type") or "")
    picture = _waves(*(side * 5 // 4 for side in source.size[1:]))
    try:
        theirs = _pixels(name.replace("FeatureExtractor", "ImageProcessor"), content, picture)
    except Exception as error:  # whatever a processor of another kind of model raises
        log.info("%s: pixels were not compared with %r of transformers: %s", file, name, error)
        return
    ours = evaluation_transform(source)(picture)
    if ours.shape != theirs.shape:
        found = f"{tuple(ours.shape)} against {tuple(theirs.shape)}"
    else:
        difference = float((ours - theirs).abs().mean() / theirs.std().clamp_min(1e-6))
        if difference <= TOLERANCE:
            return
        found = f"they differ by {difference:.0%} of their standard deviation"
    raise LoadError(
        f"{file} was read otherwise than transformers' {name} does: on one picture, {found}. Give --preprocess, or "
        "--resize, --mean and --std"
    )


def _pixels(name: str, content: dict[str, Any], picture: Any) -> torch.Tensor:
    """What a class of transformers makes of a picture. Raises any error."""
    import transformers

    kind: Any = getattr(transformers, name)
    is_processor = inspect.isclass(kind) and issubclass(kind, transformers.ImageProcessingMixin)
    if not is_processor:
        raise TypeError(f"{name} is no image processor")
    pixels: torch.Tensor = kind.from_dict(dict(content))(picture, return_tensors="pt")["pixel_values"][0]
    return pixels


def _waves(height: int, width: int) -> Any:
    """A smooth picture, other in each channel: two waves along each axis."""
    from PIL import Image

    rows, columns = np.mgrid[0:height, 0:width] / np.array([height, width]).reshape(2, 1, 1)
    phases = [np.sin(2 * np.pi * (2 * rows + columns * (1 + channel)) + channel) for channel in range(3)]
    return Image.fromarray(((np.stack(phases, -1) + 1) * 127.5).astype(np.uint8))
