"""Training images with timm's augmentation, and their order.

Both are determined by the seed, the epoch and the image alone. So an epoch that is resumed in the middle continues with
the same images, for any number of workers and processes.
"""

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mpcompile.data.images import MODES, Label, Split
from mpcompile.data.transform import in_channel_order
from mpcompile.ir.source import Source
from mpcompile.system.device import CPU, makes_tensors_on
from mpcompile.system.distributed import ProcessRank

Key = tuple[int, int]  # epoch, and index of the image in the split


@dataclass(frozen=True, slots=True)
class Augmentation:
    """Options of timm's training transform.

    `scale` is the smallest share of the area that a random crop keeps, `flip` the probability of a horizontal flip,
    `policy` timm's name of an automatic augmentation (applied to images with 3 channels), and `erasing` the probability
    that a rectangle is erased.
    """

    scale: float = 0.08
    flip: float = 0.5
    policy: str | None = "rand-m9-mstd0.5-inc1"
    erasing: float = 0.25

    def understood(self) -> bool:
        """Whether timm accepts the policy."""
        try:
            training_transform(self, Source(name="", sha256="", arch=""))
        except Exception:  # timm raises AssertionError, KeyError or ValueError
            return False
        return True


def training_transform(augmentation: Augmentation, source: Source) -> Callable[[Any], Tensor]:
    """Timm's training transform with the preprocessing of a source: PIL image -> tensor (c, h, w)."""
    return in_channel_order(source, partial(_rgb_training_transform, augmentation))


def _rgb_training_transform(augmentation: Augmentation, source: Source) -> Callable[[Any], Tensor]:
    """The training transform for a model that takes RGB."""
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
    """Images that are available as PIL images, and so can be augmented."""

    def picture(self, index: int) -> tuple[Any, Label]:
        """A PIL image, and its label or −1."""
        ...


class TrainingImages(Dataset[tuple[Tensor, int | Tensor]]):
    """The images of a split with augmentation; without it if they are not available as PIL images."""

    def __init__(self, split: Split, source: Source, augmentation: Augmentation, seed: int) -> None:
        self._images, self._seed = split.images, seed
        self._known = isinstance(split.images, Pictures) and source.size[0] in MODES
        self._transform = training_transform(augmentation, source)

    def __getitem__(self, key: Key) -> tuple[Tensor, int | Tensor]:
        epoch, index = key
        if not self._known or not isinstance(self._images, Pictures):
            image, label = self._images[index]
            return image, _stackable(label)
        picture, label = self._images.picture(index)
        with _seeded(zlib.crc32(f"{self._seed} {epoch} {index}".encode())):
            return self._transform(picture), _stackable(label)


def _stackable(label: Label) -> int | Tensor:
    """A label that a DataLoader stacks: it would take a tuple apart."""
    return label if isinstance(label, int) else torch.tensor(label)


class _seeded:  # noqa: N801 (used like a function)
    """Seeds all random generators that augmentation uses, and restores their states at the end."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __enter__(self) -> None:
        self._before = random.getstate(), np.random.get_state(), torch.get_rng_state()
        random.seed(self._seed)
        np.random.seed(self._seed)  # timm uses the global generator
        torch.manual_seed(self._seed)

    def __exit__(self, *exception: object) -> None:
        state, numpy_state, torch_state = self._before
        random.setstate(state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


class Batches(Sampler[list[Key]]):
    """Yields this rank's share of each batch, as (epoch, image) keys, for all epochs from step `start` on.

    `order` holds the indices of the images, `batch` the images per step over all ranks. Each epoch is shuffled anew by
    `seed`, and drops the last images if they do not fill a batch.
    """

    def __init__(
        self, order: tuple[int, ...], batch: int, epochs: int, seed: int, process: ProcessRank, start: int
    ) -> None:
        self._order, self._batch, self._epochs, self._seed = np.array(order), batch, epochs, seed
        self._process, self._start = process, start
        self.per_epoch = len(order) // batch

    def __len__(self) -> int:
        return self._epochs * self.per_epoch - self._start

    def __iter__(self) -> Iterator[list[Key]]:
        for epoch in range(self._start // self.per_epoch, self._epochs):
            shuffled = self._order[np.random.default_rng((self._seed, epoch)).permutation(len(self._order))]
            first = self._start - epoch * self.per_epoch if epoch == self._start // self.per_epoch else 0
            for step in range(first, self.per_epoch):
                whole = shuffled[step * self._batch : (step + 1) * self._batch]
                yield [(epoch, int(index)) for index in whole[self._process.rank :: self._process.size]]


def loader(images: TrainingImages, batches: Batches, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches with their labels, read by this number of worker processes, or by this one if it is 0.

    They are read and augmented on the CPU, whatever device makes the tensors of the pass.
    """
    with makes_tensors_on(CPU):
        waiting = iter(
            DataLoader(images, batch_sampler=batches, num_workers=workers, pin_memory=torch.cuda.is_available())
        )
    while True:
        with makes_tensors_on(CPU):
            batch = next(waiting, None)
        if batch is None:
            return
        yield batch
