"""Encoded images, of a folder or of a dataset, that are decoded and preprocessed when they are read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mpcompile.data.image_file import ImageFile, Readable
from mpcompile.data.picture import Reading, read_picture

DEFAULT_READING = Reading()


@dataclass(frozen=True)
class EncodedImages:
    """Image files after the evaluation transform of the model: float32 tensors of the model's input size (c, h, w).

    `labels` are indices of the model's outputs, or -1 if they are not known. `classes` is the number of outputs, or 0
    without labels. `names` are the classes, `mode` is PIL's colour mode. Reading raises LoadError for a file that
    cannot be decoded.
    """

    paths: Sequence[Readable]
    labels: tuple[int, ...]
    names: tuple[str, ...]
    transform: Callable[[Any], Tensor]
    mode: str
    classes: int
    reading: Reading = DEFAULT_READING

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture, label = self.picture(index)
        return self.transform(picture), label

    def picture(self, index: int) -> tuple[Any, int]:
        """The image as a PIL image, without the transform, and its label."""
        return read_picture(self.paths[index], self.mode, self.reading), self.labels[index]


@dataclass(frozen=True)
class DatasetImages(EncodedImages):
    """Images of a dataset, which holds the files itself."""

    paths: Sequence[ImageFile]
