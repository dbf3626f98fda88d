"""Image sets, splits of them, and the four splits of a run: calibration, validation, training and held-out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from mpcompile.data.metric import Metric
from mpcompile.ir.batch import arguments, stacked
from mpcompile.system.device import CPU, makes_tensors_on
from mpcompile.system.hashing import sha256
from mpcompile.system.memory import release_freed
from mpcompile.system.progress import tracked
from mpcompile.system.tensor_hashing import sha256_of

MODES = {1: "L", 3: "RGB"}  # PIL's colour mode for a number of channels
BATCH = 64
Label = int | tuple[int, ...]  # a class index, or 0 or 1 for each output of a multilabel head


@runtime_checkable
class Images(Protocol):
    """Preprocessed images by index: float tensors (c, h, w), each with its class index, or -1 if it has no label.

    For a model with several inputs, an item has a tuple of all inputs in place of the image, the image first.
    Images with several labels have 0 or 1 for each output of the model instead of a class index.

    `classes` is the number of classes, 0 if the images have no labels.
    """

    @property
    def classes(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, Label]: ...


@dataclass(frozen=True, slots=True)
class DecodedImages:
    """Images of the set `images` that were decoded once and are kept in memory (mpcompile/data/decode.py).

    `pixels` maps an index of the set to its image and label; an image over the memory limit is left out, and is decoded
    again at each use. `hashes` maps every index that was decoded to its `image_hash`.
    """

    images: Images
    pixels: Mapping[int, tuple[Any, Label]]
    hashes: Mapping[int, str]


@dataclass(frozen=True)
class Split:
    """Some images of a set, in order. `order` has their indices; `labelled` says whether their labels count.

    Images are read batch by batch, so memory holds one batch. Images in `decoded` are taken from memory. An image set
    may have `target(index)`, which returns what a metric compares the outputs with, and `target_key(index)`, its hash.
    """

    images: Images
    order: tuple[int, ...]
    labelled: bool
    decoded: DecodedImages | None = field(default=None, repr=False, compare=False)
    metric: Metric | None = None  # replaces accuracy
    device: torch.device = CPU  # where batches are put
    memory_format: torch.memory_format = torch.contiguous_format  # of images in batches

    @property
    def judged(self) -> bool:
        """Whether outputs can be judged: by a metric, or by labels."""
        return self.metric is not None or self.labelled

    def __len__(self) -> int:
        return len(self.order)

    def batch_orders(self, size: int) -> list[tuple[int, ...]]:
        """The indices of the images in each batch of this size."""
        return [self.order[start : start + size] for start in range(0, len(self.order), size)]

    def batches(self, size: int = BATCH) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (b, c, h, w) and labels (b,), -1 where unknown, or (b, outputs); the caller may change the tensors."""
        for inputs, labels in self.inputs(size):
            yield inputs[0], labels

    def inputs(self, size: int = BATCH) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        """All inputs of a model, the images first, and labels; as `batches` for models with one input."""
        for indices in self.batch_orders(size):
            pairs = [self._image(index) for index in indices]
            labels = torch.tensor([label for _, label in pairs], device=CPU).to(self.device)
            yield self._placed([image for image, _ in pairs]), labels

    def targets(self, size: int = BATCH) -> Iterator[list[Any]]:
        """What a metric compares the outputs with, batch by batch: the targets of the images, or else their labels.

        In a loop beside `inputs`, read the inputs of a batch first: their targets are then at hand.
        """
        own = getattr(self.images, "target", None)
        for chosen in self.batch_orders(size):
            yield [self._image(index)[1] if own is None else own(index) for index in chosen]

    def announced(self, size: int = BATCH) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        """The same as `inputs`; reports each batch as a step of progress before it is read."""
        count = len(self)
        starts = tracked(range(0, count, size), "image {}".format, "images", lambda start: min(size, count - start))
        for _, batch in zip(starts, self.inputs(size), strict=True):
            yield batch

    def first(self, count: int) -> Tensor:
        """The first `count` images as one batch (count, c, h, w)."""
        return self.first_inputs(count)[0]

    def first_inputs(self, count: int) -> tuple[Tensor, ...]:
        """All inputs of a model for the first `count` images, the images first."""
        return self.inputs_of(self.order[:count])

    def inputs_of(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        """All inputs of a model for these images of the set as one batch, the images first."""
        return self._placed([self._image(index)[0] for index in indices])

    def _placed(self, rows: Sequence[Any]) -> tuple[Tensor, ...]:
        """The inputs of a batch, from those of each image, on the device, where those of earlier batches are freed."""
        release_freed()
        images, *others = (one.to(self.device) for one in stacked(rows))
        return images.contiguous(memory_format=self.memory_format) if images.ndim == 4 else images, *others

    def hashes(self) -> Iterator[str]:
        """The `image_hash` of each image in order; an image that was hashed when it was decoded is not read again."""
        decoded, target = self._decoded_here(), getattr(self.images, "target_key", None)
        known: Mapping[int, str] = {} if decoded is None else decoded.hashes
        for index in self.order:
            pixels = known[index] if index in known else image_hash(*self._image(index))
            yield pixels if self.metric is None or target is None else sha256(pixels, target(index))

    def _image(self, index: int) -> tuple[Any, Label]:
        """An image (c, h, w) and its label. The tensor may be the one that is kept: callers copy it."""
        decoded = self._decoded_here()
        if decoded is not None and index in decoded.pixels:
            return decoded.pixels[index]
        with makes_tensors_on(CPU):
            return self.images[index]

    def _decoded_here(self) -> DecodedImages | None:
        """The decoded images of this very set, or None: `dataclasses.replace` may have put another set in its place."""
        return self.decoded if self.decoded is not None and self.decoded.images is self.images else None


def image_hash(pixels: Tensor | tuple[Tensor, ...], label: Label) -> str:
    """The hash of an image's type, shape, pixels and label, and of the inputs beside it."""
    return sha256(*map(sha256_of, arguments(pixels)), str(label))


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
    """The images of a run, as four splits.

    - `calibration`: passes fit to these.
    - `validation`: passes that choose between results measure on these. They are training images, disjoint from
      `calibration`.
    - `training`: a distillation trains on these. They include `calibration` and exclude `validation`.
    - `held_out`: the result is evaluated on these. No pass that changes the model sees them.

    `notes` are sentences about the images for the report.
    """

    calibration: Split = NONE
    held_out: Split = NONE
    notes: tuple[str, ...] = ()
    validation: Split = NONE
    training: Split = NONE

    def judged_by(self, metric: Metric | None) -> "Data":
        """The data with a metric that replaces accuracy; None changes nothing."""
        return self if metric is None else self._each_split(metric=metric)

    def on(self, device: torch.device, memory_format: torch.memory_format = torch.contiguous_format) -> "Data":
        """The data whose batches are put on a device, with images in this memory format."""
        if (self.calibration.device, self.calibration.memory_format) == (device, memory_format):
            return self
        return self._each_split(device=device, memory_format=memory_format)

    def _each_split(self, **changes: Any) -> "Data":
        names = ("calibration", "held_out", "validation", "training")
        return replace(self, **{name: replace(getattr(self, name), **changes) for name in names})

    def for_passes(self) -> "Data":
        """The data without held-out images, for passes that change the model."""
        return replace(self, held_out=NONE)

    def for_training(self) -> Split:
        """The images that a distillation trains on: `training`, or `calibration` if there are none."""
        return self.training if len(self.training) else self.calibration
