"""Sampled positions: the output positions (or tokens) of each image whose rows enter a layer's second moments.

Rows of one image are alike, so beyond some tens of them more rows of the same image add little, and further images add
much. The cost of second moments grows with the rows, so a large feature map is sampled: every image gives the same
number of positions, one drawn from each of as many equal runs of consecutive positions (stratified sampling).
"""

import hashlib

import torch
from jaxtyping import Int
from torch import Tensor

MIN_POSITIONS = 64  # of an image
ROWS_PER_COLUMN = 64  # rows over all images, for each weight of an output channel


def positions_per_image(available: int, columns: int, images: int) -> int:
    """How many of the `available` positions of an image are sampled, for a layer with `columns` weights per output.

    At least 64, and so many that all images together give 64 rows per column, as far as there are positions.
    """
    return min(available, max(MIN_POSITIONS, -(-ROWS_PER_COLUMN * columns // images)))


def sampled_positions(available: int, count: int, images: int, key: str) -> Int[Tensor, "images count"]:
    """`count` different positions of each image out of `available`, ascending; the same for the same `key`."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big", signed=True)
    bounds = torch.arange(count + 1) * available // count
    size = bounds.diff()
    drawn = torch.rand(
        images, count, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float64, device="cpu"
    )
    return bounds[:-1] + (drawn * size).long().clamp_max(size - 1)
