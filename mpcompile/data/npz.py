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

from mpcompile.data.images import Label
from mpcompile.errors import LoadError
from mpcompile.ir.source import Source


@dataclass(frozen=True)
class ArrayImages:
    """Images of an .npz file: uint8 pixels (n, h, w, c) of the model's input size, and labels (n,) or (n, outputs).

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

    def __getitem__(self, index: int) -> tuple[Tensor, Label]:
        image = torch.from_numpy(self.pixels[index]).permute(2, 0, 1).float() / 255
        image = image.flip(0) if self.channel_order == "bgr" else image
        return (image - self.mean[:, None, None]) / self.std[:, None, None], self._label(index)

    def picture(self, index: int) -> tuple[Any, Label]:
        """An image of one or three channels as a PIL image, and its label."""
        from PIL import Image

        pixels = self.pixels[index]
        return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels), self._label(index)

    def _label(self, index: int) -> Label:
        return int(self.labels[index]) if self.labels.ndim == 1 else tuple(map(int, self.labels[index]))


def read_npz(path: Path, source: Source, outputs: int, multilabel: bool = False) -> tuple[ArrayImages, ArrayImages]:
    """The calibration and the held-out images of an .npz file.

    `source` gives size, mean and standard deviation of the model, `outputs` its number of classes. With `multilabel`,
    labels may be 0 or 1 for each output. Raises LoadError if an array is missing or has another type or shape than the
    model needs.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            _require_memory(arrays.zip, path)
            splits = [
                _read_arrays(arrays, path, split, source, outputs if multilabel else None)
                for split in ("calibration", "heldout")
            ]
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


def _read_arrays(
    arrays: Mapping[str, NDArray[Any]], path: Path, split: str, source: Source, flags: int | None
) -> ArrayImages:
    """The images and labels of one split. Raises LoadError if types or shapes are not those the model needs.

    `flags` is the number of outputs if labels may be 0 or 1 for each of them, else None.
    """
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
    if labels.ndim == 2 and len(labels) == len(pixels):
        labels = _flags(labels, flags, f"{path}: {names[1]}")
    elif labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iu" or (labels.size and labels.min() < 0):
        raise LoadError(f"{path}: {names[1]} is {labels.dtype} {labels.shape}; it needs one class index ≥ 0 per image")
    if not len(pixels):
        raise LoadError(f"{path}: {names[0]} is empty")
    mean, std = torch.tensor(source.mean), torch.tensor(source.std)
    classes = int(labels.max()) + 1 if labels.ndim == 1 else labels.shape[1]
    return ArrayImages(pixels, labels, classes, mean, std, source.channel_order)


def _flags(labels: NDArray[Any], outputs: int | None, what: str) -> NDArray[np.integer]:
    """Labels (n, outputs) of 0 and 1. Raises LoadError for other values or another number of outputs.

    `outputs` is None if the head takes one class per image.
    """
    found = f"{what} is {labels.dtype} {labels.shape}"
    if outputs is None:
        raise LoadError(
            f"{found}, several labels per image; give --head multilabel, or one class index per image if each image "
            "has one class"
        )
    if labels.shape[1] != outputs or labels.dtype.kind not in "iub" or not np.isin(labels, (0, 1)).all():
        raise LoadError(f"{found}; with --head multilabel it needs 0 or 1 for each of the model's {outputs} outputs")
    return labels.astype(np.int64)
