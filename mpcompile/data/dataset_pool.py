"""The images of one split of a dataset that a run may use: encoded files, and labels as the dataset stores them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from mpcompile.data.divide import Numbers
from mpcompile.data.image_file import BytesImage, ImageFile
from mpcompile.errors import LoadError
from mpcompile.system.device import CPU
from mpcompile.system.memory import unused_bytes
from mpcompile.system.resource_errors import format_bytes

HELD_OUT = 5000  # held-out images that are read from a stream unless --held-out gives a number
MEMORY_SHARE = 1 / 4  # of the available memory, for the encoded images of a stream


@dataclass(frozen=True, slots=True)
class Pool:
    """The images of one split.

    - `files` and `values` have the same length. A value is a class index or name, or anything else that is no class.
    - `names` are the class names by index, or None if the dataset has none.
    - `origin` says where the images are from, for the report.
    """

    files: Sequence[ImageFile]
    values: Sequence[Any]
    names: tuple[str, ...] | None
    origin: str


def held_out_of_stream(numbers: Numbers) -> int:
    """The number of held-out images to read from a stream: that of the user, else HELD_OUT."""
    return HELD_OUT if numbers.held_out is None else numbers.held_out


def first_of_stream(numbers: Numbers, is_divided: bool) -> int:
    """The number of images to read from the first split: with those to hold out if no other split has them."""
    return numbers.calibration + numbers.validation + (held_out_of_stream(numbers) if is_divided else 0)


@dataclass(frozen=True, slots=True)
class OpenDataset:
    """The pools of a dataset. `held_out` is None if `train` is divided. `by_index`: nothing was read yet."""

    train: Pool
    held_out: Pool | None
    notes: tuple[str, ...]
    by_index: bool


def kept_in_memory(samples: Iterable[tuple[BytesImage, Any]], most: int, name: str) -> list[tuple[BytesImage, Any]]:
    """The first `most` samples of a stream, which is read no further.

    Raises LoadError if they take more than MEMORY_SHARE of the available memory.
    """
    available = unused_bytes(CPU)
    limit = None if available is None else int(MEMORY_SHARE * available)
    kept: list[tuple[BytesImage, Any]] = []
    used = 0
    for image, value in islice(samples, max(0, most)):
        used += len(image.content)
        if limit is not None and used > limit:
            raise LoadError(
                f"{name}: the first {len(kept) + 1:,} of {most:,} images take {format_bytes(used)} of memory, and "
                f"{format_bytes(limit)} are allowed; read fewer with --calibration and --held-out"
            )
        kept.append((image, value))
    return kept
