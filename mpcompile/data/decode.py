"""Decodes the calibration and validation images of a run once, before anything reads them.

The fingerprint of the run, most passes and the checks of the result read these images. Without this step each of them
opens and decodes every file again: six or seven times in one run. Training images, which may be many more, are decoded
when they are needed, and so are held-out images.
"""

from dataclasses import replace
from typing import Any

from mpcompile.data.images import Data, DecodedImages, Label, Split, image_hash
from mpcompile.data.npz import ArrayImages
from mpcompile.ir.batch import arguments
from mpcompile.system.device import CPU
from mpcompile.system.memory import unused_bytes

# 1,783 float32 images of 3 × 224 × 224: 3 times the 512 that a run calibrates and validates on by default. The images
# stay in memory until the run ends, so larger sets are not kept whole.
MOST_BYTES = 2**30
# Share of the memory beyond the reserve. The rest is for uses that the reserve does not count, such as gradients in a
# distillation.
UNUSED_SHARE = 1 / 6


def kept_limit(reserved_bytes: float) -> int:
    """How many bytes of decoded images to keep, if the run needs `reserved_bytes` of memory for other things.

    At most MOST_BYTES, and at most UNUSED_SHARE of the memory that the run may use beyond the reserve; 0 if the system
    does not report its memory.
    """
    unused = unused_bytes(CPU)
    if unused is None:
        return 0
    return max(0, min(MOST_BYTES, int(UNUSED_SHARE * (unused - reserved_bytes))))


def decode_once(data: Data, limit_bytes: int) -> Data:
    """The data with its calibration and validation images decoded and hashed: the same images, in the same order.

    At most `limit_bytes` of pixels are kept in memory, those of calibration first. Images over the limit are decoded
    again at each use, and a note says how many. Images of an .npz file are in memory already; they are only hashed.
    Raises LoadError for the first image that cannot be read.
    """
    calibration, left_bytes = _decoded(data.calibration, limit_bytes)
    validation, _ = _decoded(data.validation, left_bytes)
    splits = [split for split in (calibration, validation) if not isinstance(split.images, ArrayImages)]
    again = sum(not _is_kept(split, index) for split in splits for index in split.order)
    notes = data.notes
    if again:
        count = sum(map(len, splits))
        notes += (
            f"{again} of {count} calibration and validation images are decoded again at each use, since decoded images "
            f"may take at most {limit_bytes:,} bytes of memory",
        )
    return replace(data, calibration=calibration, validation=validation, notes=notes)


def _decoded(split: Split, limit_bytes: int) -> tuple[Split, int]:
    """The split with its images decoded, and how much of the limit is left."""
    pixels: dict[int, tuple[Any, Label]] = {}
    hashes: dict[int, str] = {}
    in_memory = isinstance(split.images, ArrayImages)
    for index in dict.fromkeys(split.order):
        image, label = split.images[index]
        hashes[index] = image_hash(image, label)
        inputs = arguments(image)
        size = sum(one.numel() * one.element_size() for one in inputs)
        if not in_memory and size <= limit_bytes:
            copies = tuple(one.clone() for one in inputs)  # the set may reuse its tensors, or return parts of others
            pixels[index] = copies if len(copies) > 1 else copies[0], label
            limit_bytes -= size
    return replace(split, decoded=DecodedImages(split.images, pixels, hashes)), limit_bytes


def _is_kept(split: Split, index: int) -> bool:
    """Whether an image of a decoded split is kept in memory."""
    return split.decoded is not None and index in split.decoded.pixels
