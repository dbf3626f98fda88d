"""Reads datasets of Hugging Face: by index (`hfds/`), or as a stream that is read until a run has enough (`hfids/`).

A local folder is read without the network. Images are taken encoded, and only those that are used are decoded. No code
of a dataset is run: datasets 4 dropped loading scripts, and older versions are refused.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from mpcompile.data.dataset_columns import class_names, holds_classes, image_column, label_column
from mpcompile.data.dataset_name import DatasetName
from mpcompile.data.dataset_pool import OpenDataset, Pool, first_of_stream, held_out_of_stream, kept_in_memory
from mpcompile.data.dataset_splits import chosen_splits
from mpcompile.data.divide import Numbers
from mpcompile.data.image_file import BytesImage
from mpcompile.errors import LoadError, RuntimeMissing, UsageError, one_line

INSTALL = "datasets is not installed: pip install 'mpcompile[hfds]'"
OLDEST = 4  # from this version on, datasets cannot run a script of a dataset
WINDOW = 1000  # a stream is shuffled in a buffer of this many images
SAVED = ("dataset_dict.json", "state.json")  # files that save_to_disk writes


@dataclass(frozen=True, slots=True)
class RowImage:
    """The encoded image of a row, read when it is opened."""

    rows: Any = field(repr=False)
    column: str
    index: int
    origin: str

    def __str__(self) -> str:
        return f"image {self.index} of {self.origin}"

    def open(self, mode: str) -> io.BytesIO:
        """The encoded bytes. Raises LoadError if the row has none."""
        return io.BytesIO(_encoded(self.rows[self.index][self.column], str(self)))

    def version(self) -> str:
        """The row, and the fingerprint that datasets gives the rows."""
        return f"{self} {getattr(self.rows, '_fingerprint', '')}"

    def identity(self) -> str:
        """The row: a fingerprint may hold times and paths of a machine."""
        return f"{self} of {len(self.rows)}"


@dataclass(frozen=True, slots=True)
class RowImages(Sequence[RowImage]):
    """All images of a split by index."""

    rows: Any = field(repr=False)
    column: str
    origin: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return RowImage(self.rows, self.column, range(len(self))[index], self.origin)


def open_hugging_face(dataset: DatasetName, numbers: Numbers) -> OpenDataset:
    """The images of `hfds/…` or `hfids/…`. Raises LoadError; RuntimeMissing if datasets is not installed."""
    splits = _splits(_library(), dataset)
    chosen = chosen_splits(dataset, list(splits))
    divided = chosen.held_out is None
    by_index = dataset.kind == "hfds"

    def pool(split: str, most: int) -> Pool:
        rows = splits[split]
        return _of_index(dataset, split, rows) if by_index else _of_stream(dataset, split, rows, most, numbers.seed)

    train = pool(chosen.train, first_of_stream(numbers, divided))
    held_out = None if chosen.held_out is None else pool(chosen.held_out, held_out_of_stream(numbers))
    return OpenDataset(train, held_out, chosen.notes, by_index)


def _library() -> Any:
    """The package datasets. Raises RuntimeMissing, also for a version that runs scripts of datasets."""
    try:
        import datasets
    except ImportError as error:
        raise RuntimeMissing(INSTALL) from error
    if int(datasets.__version__.split(".")[0]) < OLDEST:
        raise RuntimeMissing(
            f"datasets {datasets.__version__} can run code of a dataset; pip install 'datasets>={OLDEST}'"
        )
    return datasets


def _splits(library: Any, dataset: DatasetName) -> Mapping[str, Any]:
    """The splits of a dataset by name. Raises LoadError."""
    path = Path(dataset.name).expanduser()
    local = path.exists()
    if not local and dataset.name.startswith(("/", ".", "~")):
        raise LoadError(
            f"{dataset.name} does not exist; {dataset.kind}/ takes a folder, or a name on Hugging Face's hub"
        )
    saved = any((path / name).is_file() for name in SAVED)
    if saved and (dataset.config is not None or dataset.kind == "hfids"):
        raise UsageError(f"{dataset.name} was written by save_to_disk; give hfds/{dataset.name} without a config")
    streaming = {"streaming": True} if dataset.kind == "hfids" else {}
    try:
        if saved:
            loaded = library.load_from_disk(str(path))
        else:
            loaded = library.load_dataset(str(path) if local else dataset.name, dataset.config, **streaming)
    except Exception as error:  # datasets raises many kinds, and those of what it is built on
        todo = "" if local else ". It is no folder here, so it was looked for on Hugging Face's hub"
        raise LoadError(f"{dataset} cannot be loaded: {type(error).__name__}: {one_line(error)}{todo}") from error
    return loaded if isinstance(loaded, Mapping) else {str(loaded.split or "all"): loaded}


def _columns(dataset: DatasetName, rows: Any) -> tuple[Any, str, str | None, tuple[str, ...] | None]:
    """The rows with encoded images, the columns of image and label, and the class names. Raises LoadError."""
    import datasets

    if rows.features is None:  # a stream whose types are known only from its first rows
        rows = rows._resolve_features()
    image, label = image_column(dataset, rows.features), label_column(dataset, rows.features)
    label = label if label is not None and holds_classes(rows.features[label]) else None
    names = None if label is None else class_names(rows.features[label])
    if isinstance(rows.features[image], datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))
    return rows, image, label, names


def _of_index(dataset: DatasetName, split: str, rows: Any) -> Pool:
    """All images of a split, of which none is read. Raises LoadError."""
    rows, image, label, names = _columns(dataset, rows)
    values = [None] * len(rows) if label is None else rows.select_columns([label])[:][label]
    origin = f"split {split} of {dataset}"
    if not len(rows):
        raise LoadError(f"{origin} has no images; give another split")
    files = RowImages(rows.select_columns([image]), image, origin)
    return Pool(files, values, names, f"{origin} ({len(rows):,} images)")


def _of_stream(dataset: DatasetName, split: str, rows: Any, most: int, seed: int) -> Pool:
    """The first `most` images of a shuffled stream. Raises LoadError."""
    rows, image, label, names = _columns(dataset, rows)
    origin = f"split {split} of {dataset}"

    def samples() -> Iterator[tuple[BytesImage, Any]]:
        kept = rows.select_columns([image] if label is None else [image, label])
        for index, row in enumerate(kept.shuffle(seed=seed, buffer_size=WINDOW)):
            value = row[image]
            path = value.get("path") if isinstance(value, Mapping) else None
            name = f"image {index}{f' ({PurePath(path).name})' if path else ''} of {origin}"
            yield BytesImage(name, _encoded(value, name)), None if label is None else row[label]

    try:
        kept = kept_in_memory(samples(), most, origin)
    except LoadError:
        raise
    except Exception as error:  # of datasets, the network, or a file
        raise LoadError(f"{origin} cannot be read: {type(error).__name__}: {one_line(error)}") from error
    if not kept:
        raise LoadError(f"{origin} has no images; give another split")
    read = f"{len(kept):,} images of a stream, shuffled in a window of {WINDOW:,}"
    return Pool([image for image, _ in kept], [value for _, value in kept], names, f"{origin} ({read})")


def _encoded(value: Any, name: str) -> bytes:
    """The bytes of an encoded image: given, or those of the file that a row names. Raises LoadError."""
    content = value.get("bytes") if isinstance(value, Mapping) else value
    if isinstance(content, bytes):
        return content
    path = value.get("path") if isinstance(value, Mapping) else None
    if not path:
        raise LoadError(f"{name} has no encoded image; choose the column with ,image=COLUMN behind the name")
    if "://" not in path:
        return Path(path).read_bytes()
    import fsspec

    with fsspec.open(path, "rb") as file:
        found: bytes = file.read()
    return found
