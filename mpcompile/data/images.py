"""Splits of images and labels, and the four that a run has: calibration, validation, training and held-out."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from mpcompile.system.progress import tracked

MODES = {1: "L", 3: "RGB"}
BATCH = 64


@runtime_checkable
class Images(Protocol):
    """Preprocessed images by index, each with its label or -1; `classes` is how many labels there are, or 0."""

    @property
    def classes(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...


@dataclass(frozen=True)
class Split:
    """A choice of images, in order; reads them batch by batch, so memory holds one batch."""

    images: Images
    order: tuple[int, ...]
    labelled: bool

    def __len__(self) -> int:
        return len(self.order)

    def batches(self, size: int = BATCH) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (b, c, h, w) and labels (b,), -1 where unknown."""
        for start in range(0, len(self.order), size):
            pairs = [self.images[index] for index in self.order[start : start + size]]
            yield torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])

    def announced(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """`batches`, each told to whoever listens to progress before it is handed out."""
        starts = range(0, len(self), size)
        for _, batch in zip(tracked(starts, "image {}".format), self.batches(size), strict=True):
            yield batch

    def first(self, count: int) -> Tensor:
        """The first images as one batch."""
        return torch.stack([self.images[index][0] for index in self.order[:count]])


@dataclass(frozen=True)
class NoImages:
    """The empty set of images."""

    classes: int = 0

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        raise IndexError(index)


NONE = Split(NoImages(), (), labelled=False)


@dataclass(frozen=True)
class Data:
    """Images to calibrate and train on, others to decide on, and others again to evaluate on.

    What a pass fits, it fits on `calibration`; where it chooses by what it measures, it measures on `validation`, which
    are training images too. `training` are all that there are to train on, those for calibration among them and those
    for validation not. `held_out` are shown to no pass that changes the model.
    """

    calibration: Split = NONE
    held_out: Split = NONE
    notes: tuple[str, ...] = ()
    validation: Split = NONE
    training: Split = NONE

    def for_passes(self) -> "Data":
        """The same without the held-out images: what a pass that changes the model is given."""
        return replace(self, held_out=NONE)
