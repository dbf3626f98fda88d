"""Random views of images: crops at the input size, half of them mirrored.

Least squares fits the images that it saw. Views of these images are further, similar inputs, for which the dense model
gives the targets as for any image, so no label is needed.
"""

import hashlib
import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

SMALLEST_AREA = 0.35  # of the image, that a crop keeps
LARGEST_STRETCH = 4 / 3  # of the sides, one way or the other; with the area, as in Szegedy et al. (arXiv 1409.4842)


def random_view(
    images: Float[Tensor, "images channels height width"], key: str
) -> Float[Tensor, "images channels height width"]:
    """A view of each image: a random crop, resized to the whole, mirrored with probability 1/2.

    The same images and `key` give the same views. The memory format of the images is kept.
    """
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big", signed=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.rand(len(images), 5, generator=generator, dtype=torch.float64, device="cpu").tolist()
    views = torch.empty_like(images)
    for image, view, (area, stretch, down, across, side) in zip(images, views, drawn, strict=True):
        height, width = image.shape[-2:]
        share = SMALLEST_AREA + (1 - SMALLEST_AREA) * area
        ratio = math.exp((2 * stretch - 1) * math.log(LARGEST_STRETCH))  # of width to height, relative to the image's
        high = max(1, min(height, round(height * math.sqrt(share / ratio))))
        wide = max(1, min(width, round(width * math.sqrt(share * ratio))))
        top, left = int(down * (height - high + 1)), int(across * (width - wide + 1))
        crop = image[:, top : top + high, left : left + wide]
        resized = F.interpolate(crop[None], (height, width), mode="bicubic", antialias=True)[0]
        view.copy_(resized.flip(-1) if side < 0.5 else resized)
    return views
