"""The value of --data -> calibration, validation, training and held-out images.

`--data` takes one of these:

- a folder with `train/` and one of `val/`, `validation/` or `test/` (also `Train/`, `training/`, `valid/` …), each with
  one subfolder per class;
- a folder with one subfolder per class: its images are shuffled by the seed and divided;
- a folder of images without subfolders: the same, without labels, so agreement is measured instead of accuracy;
- an .npz file with `calibration_images`, `calibration_labels`, `heldout_images` and `heldout_labels`: images are uint8
  of shape (n, h, w) or (n, h, w, c), labels are integers of shape (n,), or 0 and 1 of shape (n, outputs) for a
  multilabel head.

Class folders are matched to the model's outputs by mpcompile/data/class_names.py. Images are preprocessed as the
model's `source` says. timm's own dataset skips an image that cannot be read; here it is an error,
unless `skip_broken` is set.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from mpcompile.data.class_names import INSTEAD, no_classes
from mpcompile.data.folder import FolderImages, read_folders
from mpcompile.data.images import Data, Images, Split
from mpcompile.data.npz import read_npz
from mpcompile.data.picture import Reading
from mpcompile.data.survey import readable, surveyed
from mpcompile.errors import LoadError, UsageError
from mpcompile.ir.model import Source


def load_data(
    path: Path,
    source: Source,
    outputs: int,
    calibration: int = 256,
    held_out: int | None = None,
    seed: int = 0,
    validation: int = 256,
    *,
    classes: Path | None = None,
    exif: str = "apply",
    alpha: str = "drop",
    skip_broken: bool = False,
    multilabel: bool = False,
) -> Data:
    """The images at `path`, preprocessed for a model of that `source` with that many `outputs`, each of them a class.

    Args:
        path: a folder or an .npz file.
        source: the input size and the preprocessing of the model, and its labels.
        outputs: number of outputs; 0 if they are not classes.
        calibration: largest number of calibration images.
        held_out: largest number of held-out images; None takes all.
        seed: decides which images are taken.
        validation: largest number of validation images. Without a held-out folder, it gets at most a fifth of the
            images that are not for calibration.
        classes: a file that gives the output of each class folder (mpcompile/data/class_file.py).
        exif: `apply` or `ignore` the EXIF orientation of image files.
        alpha: what shows through transparent pixels of image files: `drop`, `white` or `black` (class Reading).
        skip_broken: leave image files out that cannot be decoded. Decodes every file of the folder once.
        multilabel: an image may have several labels, which only an .npz file can hold.

    Without a held-out folder, if there are no more images than `calibration`, half of them calibrate. Raises LoadError.
    """
    if not _exists(path):
        raise LoadError(f"{path} does not exist; --data takes a folder of images or an .npz file")
    if not path.is_file() and not path.is_dir():
        raise LoadError(f"{path} is a pipe or a device; --data takes a folder of images or an .npz file")
    notes: list[str] = []
    reading = Reading(exif, alpha)
    train: Images
    test: Images | None
    if path.is_file():
        _require_no_options(path, classes, reading, skip_broken)
        train, test = read_npz(path, source, outputs, multilabel)
    else:
        files, held_out_files = read_folders(path, source, outputs, classes, reading, notes)
        if skip_broken:
            files = _without_broken(files, path, notes)
            held_out_files = held_out_files and _without_broken(held_out_files, path, notes)
        train, test = files, held_out_files
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(train))
    count = calibration
    if test is None and 1 < len(train) <= calibration:
        count = len(train) // 2
        notes.append(
            f"there are {len(train)} images, and {calibration} were asked for calibration: half of them calibrate, and "
            "the others are held out"
        )
    calibrating, left = order[:count], order[count:]
    if test is None:  # no separate held-out folder: divide the images into disjoint splits
        validating = left[: min(validation, len(left) // 5)]
        test, evaluating = train, left[len(validating) :]
    else:
        validating = left[:validation]
        evaluating = rng.permutation(len(test))
    if not len(evaluating):
        raise LoadError(
            f"{path}: all {len(train)} images are used for calibration and none are left as held-out images; "
            "give more images, or a smaller --calibration"
        )
    evaluating = np.sort(evaluating[:held_out])  # in the order of the folder: neighbours on disk are read together
    if len(calibrating) < count:
        notes.append(f"{calibration} calibration images were requested, but there are only {len(calibrating)}")
    training = np.setdiff1d(order if test is not train else calibrating, validating)
    labelled, note = _labels_fit(test, outputs)
    data = Data(
        Split(train, tuple(calibrating.tolist()), labelled),
        Split(test, tuple(evaluating.tolist()), labelled),
        (*notes, *note),
        Split(train, tuple(validating.tolist()), labelled),
        Split(train, tuple(training.tolist()), labelled),
    )
    return _surveyed(data)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError) as error:  # the name is too long or has a zero byte, or permission is missing
        raise LoadError(f"{path} cannot be looked up: {error}") from error


def _require_no_options(path: Path, classes: Path | None, reading: Reading, skip_broken: bool) -> None:
    """Raises UsageError if an option for image files is given with an .npz file."""
    given = {
        "--classes": classes is not None,
        "--exif": reading.exif != "apply",
        "--alpha": reading.alpha != "drop",
        "--skip-broken": skip_broken,
    }
    options = [option for option, is_given in given.items() if is_given]
    if options:
        raise UsageError(f"{path} is a file, and {', '.join(options)} applies to folders of images; leave it out")


def _without_broken(images: FolderImages, path: Path, notes: list[str]) -> FolderImages:
    """The images that can be decoded. Raises LoadError if none can."""
    kept, note = readable(images.paths)
    if not any(kept):
        raise LoadError(f"{path}: none of the {len(kept)} images can be read; give another folder")
    notes += [note] if note else []
    return images.only(kept)


def _surveyed(data: Data) -> Data:
    """The data with notes that count unusual image files, and with the range of files of more than 8 bits.

    Calibration, validation and held-out images are surveyed. Training images may be many more, and are read alike.
    """
    paths = [
        split.images.paths[index]
        for split in (data.calibration, data.validation, data.held_out)
        if isinstance(split.images, FolderImages)
        for index in split.order
    ]
    if not paths or not isinstance(data.calibration.images, FolderImages):
        return data
    reading, notes = surveyed(paths, data.calibration.images.reading)
    changed = {id(images): replace(images, reading=reading) for images in _folders_of(data)}
    calibration, validation, training, held_out = (
        replace(split, images=changed[id(split.images)])
        for split in (data.calibration, data.validation, data.training, data.held_out)
    )
    return Data(calibration, held_out, data.notes + notes, validation, training)


def _folders_of(data: Data) -> list[FolderImages]:
    """The distinct sets of image files of the splits."""
    splits = (data.calibration, data.validation, data.training, data.held_out)
    return list({id(s.images): s.images for s in splits if isinstance(s.images, FolderImages)}.values())


def _labels_fit(images: Images, outputs: int) -> tuple[bool, list[str]]:
    """Whether the classes are the model's outputs; if not, with a note for the report."""
    if images.classes == outputs > 0:
        return True, []
    if isinstance(images, FolderImages):
        return False, []  # read_folders has noted why
    if not outputs:
        return False, [f"{no_classes(images.classes)}: {INSTEAD}"]
    return False, [f"the images have {images.classes} classes, the model {outputs} outputs: {INSTEAD}"]
