"""Reads datasets of TensorFlow Datasets that are prepared on this machine, as a stream of encoded images (`tfds/`)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpcompile.data.dataset_columns import class_names, holds_classes, image_column, label_column
from mpcompile.data.dataset_name import DatasetName
from mpcompile.data.dataset_pool import OpenDataset, Pool, first_of_stream, held_out_of_stream, kept_in_memory
from mpcompile.data.dataset_splits import chosen_splits
from mpcompile.data.divide import Numbers
from mpcompile.data.image_file import BytesImage
from mpcompile.errors import LoadError, RuntimeMissing, one_line

INSTALL = "tensorflow-datasets is not installed: pip install 'mpcompile[tfds]'"
WINDOW = 1000  # a stream is shuffled in a buffer of this many images


def open_tensorflow(dataset: DatasetName, numbers: Numbers) -> OpenDataset:
    """The images of `tfds/NAME`, or of the folder of a prepared version. Nothing is downloaded or prepared.

    Raises LoadError; RuntimeMissing if TensorFlow Datasets is not installed.
    """
    library = _library()
    builder = _builder(library, dataset)
    chosen = chosen_splits(dataset, list(builder.info.splits))

    def pool(split: str, most: int) -> Pool:
        return _of_stream(library, builder, dataset, split, most, numbers.seed)

    train = pool(chosen.train, first_of_stream(numbers, chosen.held_out is None))
    held_out = None if chosen.held_out is None else pool(chosen.held_out, held_out_of_stream(numbers))
    return OpenDataset(train, held_out, chosen.notes, by_index=False)


def _library() -> Any:
    """The package tensorflow_datasets. Raises RuntimeMissing."""
    try:
        import tensorflow_datasets
        from tensorflow import config
    except ImportError as error:
        raise RuntimeMissing(INSTALL) from error
    config.set_visible_devices([], "GPU")  # its memory is for the model
    return tensorflow_datasets


def _builder(library: Any, dataset: DatasetName) -> Any:
    """The builder of a prepared dataset. Raises LoadError."""
    path = Path(dataset.name).expanduser()
    try:
        if path.is_dir():
            builder = library.builder_from_directory(str(path))
        else:
            builder = library.builder(dataset.name, **({} if dataset.config is None else {"config": dataset.config}))
        prepared = builder.is_prepared()  # before `info`, which asks the network for what is not here
    except Exception as error:  # TensorFlow Datasets raises many kinds
        raise LoadError(f"{dataset} cannot be loaded: {type(error).__name__}: {one_line(error)}") from error
    if not prepared:
        raise LoadError(f"{dataset} is not prepared in {builder.data_dir}; run tfds build {dataset.name}")
    return builder


def _of_stream(library: Any, builder: Any, dataset: DatasetName, split: str, most: int, seed: int) -> Pool:
    """The first `most` images of a split, shuffled by the seed. Raises LoadError."""
    from tensorflow import data as tensorflow_data

    features = builder.info.features
    image, label = image_column(dataset, features), label_column(dataset, features)
    label = label if label is not None and holds_classes(features[label]) else None
    names = None if label is None else class_names(features[label])
    origin = f"split {split} of {dataset}"

    def samples() -> Iterator[tuple[BytesImage, Any]]:
        stream = builder.as_dataset(
            split=split,
            shuffle_files=True,
            decoders={image: library.decode.SkipDecoding()},
            read_config=library.ReadConfig(shuffle_seed=seed),
        )
        options = tensorflow_data.Options()
        options.deterministic = True  # the same images for the same seed
        stream = stream.shuffle(WINDOW, seed=seed).with_options(options)
        for index, row in enumerate(library.as_numpy(stream)):
            value = None if label is None else row[label]
            yield BytesImage(f"image {index} of {origin}", bytes(row[image])), _plain(value)

    try:
        kept = kept_in_memory(samples(), most, origin)
    except LoadError:
        raise
    except Exception as error:  # of TensorFlow, or of a file
        raise LoadError(f"{origin} cannot be read: {type(error).__name__}: {one_line(error)}") from error
    if not kept:
        raise LoadError(f"{origin} has no images; give another split")
    read = f"{len(kept):,} images of a stream, shuffled in a window of {WINDOW:,}"
    return Pool([file for file, _ in kept], [value for _, value in kept], names, f"{origin} ({read})")


def _plain(value: Any) -> Any:
    """A label as a number or text of Python: NumPy's scalars and bytes converted, anything else as it is."""
    value = value.item() if getattr(value, "ndim", None) == 0 else value
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
