"""The images of a run from a dataset named as in timm: `wds/…`, `hfds/…`, `hfids/…` or `tfds/…`.

Images are preprocessed as those of a folder, and their classes are matched to the outputs by the same rules. The seed
draws them: by index (`hfds`), else from a stream that is read until the run has enough.
"""

from pathlib import Path

from mpcompile.data.class_file import read_class_file
from mpcompile.data.class_names import ClassTable
from mpcompile.data.dataset_classes import output_indices
from mpcompile.data.dataset_name import DatasetName
from mpcompile.data.dataset_pool import HELD_OUT, OpenDataset, Pool
from mpcompile.data.divide import Numbers, divided, surveyed_files
from mpcompile.data.encoded_images import DatasetImages
from mpcompile.data.hugging_face_sets import open_hugging_face
from mpcompile.data.image_tree import printable
from mpcompile.data.images import MODES, Data
from mpcompile.data.loading import without_broken
from mpcompile.data.picture import Reading
from mpcompile.data.shard_pools import open_shards
from mpcompile.data.tensorflow_sets import open_tensorflow
from mpcompile.data.transform import evaluation_transform
from mpcompile.errors import LoadError, UsageError
from mpcompile.ir.source import Source

READERS = {
    "wds": open_shards,
    "hfds": open_hugging_face,
    "hfids": open_hugging_face,
    "tfds": open_tensorflow,
}


def load_dataset_images(
    dataset: DatasetName,
    source: Source,
    outputs: int,
    numbers: Numbers,
    *,
    classes: Path | None = None,
    exif: str = "apply",
    alpha: str = "drop",
    skip_broken: bool = False,
) -> Data:
    """The images of a dataset, preprocessed for a model of that `source` with that many `outputs`.

    Args:
        dataset: its name and options.
        source: the input size and the preprocessing of the model, and its labels.
        outputs: number of outputs, each of them a class; 0 if they are not classes.
        numbers: how many images to draw, and the seed. Without a number, a stream gives HELD_OUT held-out images.
        classes: a file that gives the output of each class (mpcompile/data/class_file.py).
        exif: as in `load_data`.
        alpha: as in `load_data`.
        skip_broken: leave images out that cannot be decoded; not for `hfds`, of which every image would be decoded.

    Raises LoadError; RuntimeMissing if a package is not installed; UsageError if an option does not fit.
    """
    if source.size[0] not in MODES:
        raise LoadError(
            f"the model takes images of {source.size[0]} channels, and those of a dataset have 1 or 3; give an .npz "
            "file"
        )
    if skip_broken and dataset.kind == "hfds":
        raise UsageError(
            f"--skip-broken would decode every image of {dataset}; leave it out, or give hfids/{dataset.name}"
        )
    table = ClassTable(read_class_file(classes), printable(str(classes))) if classes else None
    found = READERS[dataset.kind](dataset, numbers)
    notes = list(found.notes)
    pools = [found.train] if found.held_out is None else [found.train, found.held_out]
    columns = [pool.values for pool in pools]
    labels = output_indices(columns, found.train.names, outputs, table, source.labels, notes)
    reading = Reading(exif, alpha)
    sets = [_images(pool, own, source, outputs, reading) for pool, own in zip(pools, labels, strict=True)]
    if skip_broken:
        sets = [without_broken(images, Path(dataset.name), notes) for images in sets]
    data = divided(sets[0], sets[1] if len(sets) == 2 else None, outputs, numbers, str(dataset), ())
    return surveyed_files(_told(data, found, numbers, notes))


def _images(pool: Pool, labels: tuple[int, ...], source: Source, outputs: int, reading: Reading) -> DatasetImages:
    """The images of a pool with the preprocessing of the source."""
    known = all(label >= 0 for label in labels)
    return DatasetImages(
        paths=pool.files,
        labels=labels,
        names=pool.names or (),
        transform=evaluation_transform(source),
        mode=MODES[source.size[0]],
        classes=outputs if known else 0,
        reading=reading,
    )


def _told(data: Data, found: OpenDataset, numbers: Numbers, notes: list[str]) -> Data:
    """The data with notes that say which images were drawn, from what, and by which seed."""
    held_out = found.held_out or found.train
    drawn = (
        f"{len(data.calibration):,} calibration and {len(data.validation):,} validation images were drawn by seed "
        f"{numbers.seed} from {found.train.origin}, and {len(data.held_out):,} held-out images from {held_out.origin}"
    )
    if not found.by_index and numbers.held_out is None and len(held_out.files) >= HELD_OUT:
        notes.append(
            f"a stream is not read to its end: at most {HELD_OUT:,} images are held out (--held-out gives another "
            "number)"
        )
    return Data(data.calibration, data.held_out, (drawn, *notes, *data.notes), data.validation, data.training)
