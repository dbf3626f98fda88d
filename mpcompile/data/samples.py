"""Samples that a function of the user gives: (inputs, target) pairs or dicts, one by one or in batches."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from mpcompile.data.images import MODES
from mpcompile.data.metric import target_hash
from mpcompile.data.transform import evaluation_transform
from mpcompile.errors import LoadError
from mpcompile.ir.source import Source
from mpcompile.system.resource_errors import available_bytes, format_bytes

IMAGE_KEYS = ("pixel_values", "image", "images", "img")
TARGET_KEYS = ("label", "labels", "target", "targets", "annotation", "mask")
RECENT = 256  # targets that are kept after their images were read, so that no sample is read twice for a metric
MEMORY_SHARE = 1 / 4  # of the available memory, for samples that can be read only once


class SampleImages:
    """Samples by index as images of a run, each with its target.

    Args:
        samples: `(inputs, target)` pairs or dicts, by index.
        source: the model's source: size of the images, and the preprocessing of PIL images.
        names: the names of the model's inputs, the images first.
    """

    classes = 0

    def __init__(self, samples: Any, source: Source, names: Sequence[str]) -> None:
        self.samples, self._source, self._names = samples, source, tuple(names)
        self._recent: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """The inputs of a sample, and its target if that is a class, else -1. Raises LoadError."""
        try:
            item = self.samples[index]
        except Exception as error:
            raise LoadError(f"sample {index} cannot be read: {type(error).__name__}: {error}") from error
        inputs, target = parts_of(item, index)
        self._recent[index] = target
        if len(self._recent) > RECENT:
            del self._recent[next(iter(self._recent))]
        label = class_of(target)
        return self._tensors(inputs, index), -1 if label is None else label

    def target(self, index: int) -> Any:
        """The target of a sample."""
        if index not in self._recent:
            self[index]
        return self._recent[index]

    def target_key(self, index: int) -> str:
        """The hash of the target of a sample."""
        return target_hash(self.target(index))

    def _tensors(self, inputs: Any, index: int) -> Any:
        """The inputs as the model takes them: one tensor, or a tuple of several in the order of its inputs."""
        if isinstance(inputs, Mapping):
            missing = [name for name in self._names if name not in inputs]
            if missing and len(inputs) == len(self._names) == 1:
                return self._image(next(iter(inputs.values())), index)
            if missing:
                raise LoadError(f"sample {index} has no input {missing[0]!r}; it has {', '.join(map(str, inputs))}")
            inputs = tuple(inputs[name] for name in self._names)
        if not isinstance(inputs, tuple | list):
            return self._image(inputs, index)
        if len(inputs) != len(self._names):
            raise LoadError(f"sample {index} has {len(inputs)} inputs; the model takes {', '.join(self._names)}")
        image, others = self._image(inputs[0], index), tuple(torch.as_tensor(one) for one in inputs[1:])
        return (image, *others) if others else image

    def _image(self, image: Any, index: int) -> Tensor:
        """The image as a float tensor (c, h, w)."""
        if hasattr(image, "convert"):  # a PIL image
            picture = image.convert(MODES.get(self._source.size[0], "RGB"))
            return evaluation_transform(self._source)(picture)
        if not isinstance(image, Tensor | np.ndarray):
            raise LoadError(f"sample {index} has a {type(image).__name__} as its image; give a float tensor (c, h, w)")
        tensor = torch.as_tensor(image)
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise LoadError(
                f"the image of sample {index} is {kind}; give preprocessed floating-point tensors, or PIL images"
            )
        if tuple(tensor.shape) != self._source.size:
            raise LoadError(
                f"the image of sample {index} has shape {tuple(tensor.shape)}; the model takes {self._source.size}"
            )
        return tensor.float()


def class_of(target: Any) -> int | None:
    """The class index that a target is; None if it is something else."""
    if isinstance(target, Tensor | np.ndarray) and target.ndim == 0:
        target = target.item()
    if isinstance(target, int | np.integer) and not isinstance(target, bool) and target >= 0:
        return int(target)
    return None


def parts_of(item: Any, index: int) -> tuple[Any, Any]:
    """The inputs and the target of a sample or of a batch. Raises LoadError."""
    if isinstance(item, Mapping):
        image = next((key for key in IMAGE_KEYS if key in item), None)
        if image is not None:
            target = next((key for key in TARGET_KEYS if key in item), None)
            rest = {key: value for key, value in item.items() if key != image}
            return item[image], rest if target is None else item[target]
    elif isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1]
    shown = f"a dict with {', '.join(map(str, item))}" if isinstance(item, Mapping) else f"a {type(item).__name__}"
    raise LoadError(
        f"sample {index} is {shown}; give (inputs, target), or a dict with {IMAGE_KEYS[1]} and {TARGET_KEYS[0]}"
    )


def indexed(given: Any, axes: int, name: str, most: int | None = None) -> Any:
    """Samples with a length and an index. An iterable without, or one of batches, is read into memory once.

    Args:
        given: a sequence or an iterable of samples or batches, or a function without arguments that returns one.
        axes: the axes of the images of one sample, such as 3.
        name: what to call it in errors.
        most: how many samples to read at least from a torch IterableDataset, which may have no end; it is read no
            further than the batch that has the last of them. None reads it all.

    Raises LoadError if it is none, or if it takes more memory than MEMORY_SHARE of what is available.
    """
    given = called(given)
    by_index = hasattr(given, "__getitem__") and hasattr(given, "__len__") and not isinstance(given, str | bytes)
    by_index = by_index and not isinstance(given, IterableDataset)  # it inherits a __getitem__ that raises
    if by_index and (not len(given) or not _is_batch(given[0], axes)):
        return given
    if not by_index and not isinstance(given, Iterable):
        raise LoadError(f"{name} returned a {type(given).__name__}; it must return an iterable of (inputs, target)")
    available = available_bytes()
    limit, used, samples = (None if available is None else MEMORY_SHARE * available), 0, []
    most = most if is_stream(given) else None
    for index, item in enumerate(map(given.__getitem__, range(len(given))) if by_index else given):
        for sample in _samples_of(item, axes, index):
            samples.append(sample)
            used += _bytes(sample)
        if most is not None and len(samples) >= most:
            return samples[:most]
        if limit is not None and used > limit:
            raise LoadError(
                f"{name} returned an iterable without an index, of which {len(samples):,} samples take "
                f"{format_bytes(used)} of memory; return a sequence with __getitem__ and __len__, or fewer samples"
            )
    return samples


def called(given: Any) -> Any:
    """What a function returns; anything else as it is."""
    is_function = callable(given) and not hasattr(given, "__iter__") and not hasattr(given, "__getitem__")
    return given() if is_function else given


def is_stream(given: Any) -> bool:
    """Whether samples are a torch IterableDataset, or a DataLoader of one."""
    return isinstance(getattr(given, "dataset", given), IterableDataset)


def _first_tensor(inputs: Any) -> Any:
    """The images of a sample or of a batch."""
    if isinstance(inputs, Mapping):
        inputs = next((inputs[key] for key in IMAGE_KEYS if key in inputs), next(iter(inputs.values()), None))
    return inputs[0] if isinstance(inputs, tuple | list) and inputs else inputs


def _is_batch(item: Any, axes: int) -> bool:
    image = _first_tensor(parts_of(item, 0)[0])
    return isinstance(image, Tensor | np.ndarray) and image.ndim == axes + 1


def _samples_of(item: Any, axes: int, index: int) -> list[tuple[Any, Any]]:
    """The samples of a batch, or the sample itself."""
    inputs, target = parts_of(item, index)
    if not _is_batch((inputs, target), axes):
        return [(inputs, target)]
    count = len(_first_tensor(inputs))
    return [(_row(inputs, row, count, whole=False), _row(target, row, count)) for row in range(count)]


def _row(value: Any, row: int, count: int, whole: bool = True) -> Any:
    """The part of a batch of `count` that belongs to one sample.

    That is entry `row` of a tensor or a list; of a dict, or of a sequence of another length, the parts of its parts.
    `whole` says that a sequence of length `count` has an entry for each sample.
    """
    if isinstance(value, Mapping):
        return {key: _row(part, row, count) for key, part in value.items()}
    if isinstance(value, tuple | list) and not (whole and len(value) == count):
        return tuple(_row(part, row, count) for part in value)
    return value[row]


def _bytes(sample: Any) -> int:
    """The size of the tensors and arrays of a sample."""
    if isinstance(sample, Tensor | np.ndarray):
        return int(sample.nbytes)
    if isinstance(sample, Mapping):
        return sum(map(_bytes, sample.values()))
    return sum(map(_bytes, sample)) if isinstance(sample, tuple | list) else 0
