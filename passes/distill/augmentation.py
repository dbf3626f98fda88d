"""Training images, augmented as timm does, and their order: both follow from the seed, the epoch and the image alone.

So an epoch that is taken up again in its middle goes on as it would have, with any number of workers and processes.
"""

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mpcompile.data.images import MODES, Split
from mpcompile.ir.model import Source
from mpcompile.system.distributed import ProcessRank

Key = tuple[int, int]  # epoch, and index of the image among the split's images


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What timm's training transform does to an image.

    `scale` is the least share of its area that a crop keeps; `policy` is timm's spelling of an automatic augmentation,
    for images of three channels; `erasing` is the probability that a rectangle is erased.
    """

    scale: float = 0.08
    flip: float = 0.5
    policy: str | None = "rand-m9-mstd0.5-inc1"
    erasing: float = 0.25

    def understood(self) -> bool:
        """Whether timm knows the policy."""
        try:
            transform_of(self, Source(name="", sha256="", arch=""))
        except Exception:  # timm asserts, and raises KeyError and ValueError
            return False
        return True


def transform_of(augmentation: Augmentation, source: Source) -> Callable[[Any], Tensor]:
    """The training transform of timm for the images of a source."""
    from timm.data import create_transform

    transform: Callable[[Any], Tensor] = create_transform(
        source.size,
        is_training=True,
        interpolation=source.interpolation,
        mean=source.mean,
        std=source.std,
        scale=(augmentation.scale, 1.0),
        hflip=augmentation.flip,
        color_jitter=None,
        auto_augment=augmentation.policy if source.size[0] == 3 else None,
        re_prob=augmentation.erasing,
        re_mode="pixel",
    )
    return transform


@runtime_checkable
class Pictures(Protocol):
    """Images that can be had before preprocessing, and so can be augmented."""

    def picture(self, index: int) -> tuple[Any, int]:
        """A PIL image and its label or −1."""
        ...


class TrainingImages(Dataset[tuple[Tensor, int]]):
    """The images of a split under an augmentation; as they are where PIL has no picture of them."""

    def __init__(self, split: Split, source: Source, augmentation: Augmentation, seed: int) -> None:
        self._images, self._seed = split.images, seed
        self._known = isinstance(split.images, Pictures) and source.size[0] in MODES
        self._transform = transform_of(augmentation, source)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        epoch, index = key
        if not self._known or not isinstance(self._images, Pictures):
            return self._images[index]
        picture, label = self._images.picture(index)
        with _seeded(zlib.crc32(f"{self._seed} {epoch} {index}".encode())):
            return self._transform(picture), label


class _seeded:  # noqa: N801 (a context, as a function would be)
    """Inside, every generator that augmentation draws from starts from one number; after it they are as before."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __enter__(self) -> None:
        self._before = random.getstate(), np.random.get_state(), torch.get_rng_state()
        random.seed(self._seed)
        np.random.seed(self._seed)  # timm draws from the global one
        torch.manual_seed(self._seed)

    def __exit__(self, *exception: object) -> None:
        state, numpy_state, torch_state = self._before
        random.setstate(state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


class Batches(Sampler[list[Key]]):
    """The batches of all epochs from one step on, each shuffled anew; this process's share of each.

    An epoch leaves out the images that fill no whole batch.
    """

    def __init__(
        self, order: tuple[int, ...], batch: int, epochs: int, seed: int, place: ProcessRank, start: int
    ) -> None:
        self._order, self._batch, self._epochs, self._seed = np.array(order), batch, epochs, seed
        self._place, self._start = place, start
        self.per_epoch = len(order) // batch

    def __len__(self) -> int:
        return self._epochs * self.per_epoch - self._start

    def __iter__(self) -> Iterator[list[Key]]:
        for epoch in range(self._start // self.per_epoch, self._epochs):
            shuffled = self._order[np.random.default_rng((self._seed, epoch)).permutation(len(self._order))]
            first = self._start - epoch * self.per_epoch if epoch == self._start // self.per_epoch else 0
            for step in range(first, self.per_epoch):
                whole = shuffled[step * self._batch : (step + 1) * self._batch]
                yield [(epoch, int(index)) for index in whole[self._place.rank :: self._place.size]]


def loader(images: TrainingImages, batches: Batches, workers: int) -> "DataLoader[tuple[Tensor, int]]":
    """The batches, read by so many worker processes."""
    return DataLoader(images, batch_sampler=batches, num_workers=workers, pin_memory=torch.cuda.is_available())
