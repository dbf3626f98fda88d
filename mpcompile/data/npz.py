"""Images and labels of an .npz file, held in memory as uint8."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpcompile.errors import LoadError
from mpcompile.ir.model import Source


@dataclass(frozen=True)
class ArrayImages:
    """Images of an .npz file: uint8 pixels (n, h, w, c) of the model's input size, and labels (n,).

    An image is read as (pixels / 255 - mean) / std, in float32 of shape (c, h, w). If `channel_order` is "bgr", its
    channels are reversed first.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.integer]
    classes: int
    mean: Tensor
    std: Tensor
    channel_order: str = "rgb"

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.from_numpy(self.pixels[index]).permute(2, 0, 1).float() / 255
        image = image.flip(0) if self.channel_order == "bgr" else image
        return (image - self.mean[:, None, None]) / self.std[:, None, None], int(self.labels[index])

    def picture(self, index: int) -> tuple[Any, int]:
        """An image of one or three channels as a PIL image, and its label."""
        from PIL import Image

        pixels = self.pixels[index]
        return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels), int(self.labels[index])


def read_npz(path: Path, source: Source, outputs: int) -> tuple[ArrayImages, ArrayImages]:
    """The calibration and the held-out images of an .npz file.

    `source` gives size, mean and standard deviation of the model, `outputs` its number of classes. Raises LoadError if
    an array is missing or has another type or shape than the model needs.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            _require_memory(arrays.zip, path)
            splits = [_read_arrays(arrays, path, split, source) for split in ("calibration", "heldout")]
    except LoadError:
        raise
    except Exception as error:  # numpy raises ValueError, OSError, EOFError, BadZipFile, pickle errors …
        raise LoadError(f"{path} cannot be read as an .npz file: {error}") from error
    # Labels are indices of the model's outputs, and some outputs may have no image.
    classes = max(outputs, *(split.classes for split in splits))
    return replace(splits[0], classes=classes), replace(splits[1], classes=classes)


def _require_memory(archive: ZipFile, path: Path) -> None:
    """Raises LoadError if the arrays, by the sizes in their headers, do not fit into the machine's memory."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = 0
    for name in (name for name in archive.namelist() if name.endswith(".npy")):
        with archive.open(name) as array:
            read = np.lib.format.read_array_header_1_0
            if np.lib.format.read_magic(array) != (1, 0):
                read = np.lib.format.read_array_header_2_0
            shape, _, kind = read(array)
            needed += math.prod(shape) * kind.itemsize
    if needed > total:
        raise LoadError(
            f"{path} unpacks to {needed:,} bytes, and this machine has {total:,} bytes of memory; give fewer images"
        )


def _read_arrays(arrays: Mapping[str, NDArray[Any]], path: Path, split: str, source: Source) -> ArrayImages:
    """The images and labels of one split. Raises LoadError if types or shapes are not those the model needs."""
    names = f"{split}_images", f"{split}_labels"
    if any(name not in arrays for name in names):
        raise LoadError(f"{path} has the arrays {', '.join(arrays) or 'none'}; it needs {names[0]} and {names[1]}")
    pixels, labels = (arrays[name] for name in names)
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    channels, height, width = source.size
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (height, width, channels):
        raise LoadError(
            f"{path}: {names[0]} is {pixels.dtype} {pixels.shape}; "
            f"the model needs uint8 (n, {height}, {width}, {channels})"
        )
    if labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iu" or (labels.size and labels.min() < 0):
        raise LoadError(f"{path}: {names[1]} is {labels.dtype} {labels.shape}; it needs one class index ≥ 0 per image")
    if not len(pixels):
        raise LoadError(f"{path}: {names[0]} is empty")
    mean, std = torch.tensor(source.mean), torch.tensor(source.std)
    return ArrayImages(pixels, labels, int(labels.max()) + 1, mean, std, source.channel_order)
