"""The value of --data -> calibration, validation, training and held-out images.

`--data` takes one of these:

- a folder with `train/` and one of `val/`, `validation/` or `test/` (also `Train/`, `training/`, `valid/` …), each with
  one subfolder per class;
- a folder with one subfolder per class: its images are shuffled by the seed and divided;
- a folder of images without subfolders: the same, without labels, so agreement is measured instead of accuracy;
- an .npz file with `calibration_images`, `calibration_labels`, `heldout_images` and `heldout_labels`: images are uint8
  of shape (n, h, w) or (n, h, w, c), labels are integers of shape (n,), or 0 and 1 of shape (n, outputs) for a
  multilabel head.

Datasets named as in timm (`wds/…`, `hfds/…`) are read by mpcompile/data/dataset_images.py.

Class folders are matched to the model's outputs by mpcompile/data/class_names.py. Images are preprocessed as the
model's `source` says. timm's own dataset skips an image that cannot be read; here it is an error,
unless `skip_broken` is set.
"""

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from mpcompile.data.divide import Numbers, divided, surveyed_files
from mpcompile.data.encoded_images import EncodedImages
from mpcompile.data.folder import read_folders
from mpcompile.data.images import Data, Images
from mpcompile.data.npz import read_npz
from mpcompile.data.picture import Reading
from mpcompile.data.survey import readable
from mpcompile.errors import LoadError, UsageError
from mpcompile.ir.source import Source

AnySet = TypeVar("AnySet", bound=EncodedImages)


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
    if not exists(path):
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
            files = without_broken(files, path, notes)
            held_out_files = held_out_files and without_broken(held_out_files, path, notes)
        train, test = files, held_out_files
    numbers = Numbers(calibration, validation, held_out, seed)
    return surveyed_files(divided(train, test, outputs, numbers, str(path), notes))


def exists(path: Path) -> bool:
    """Whether a path exists. Raises LoadError if that cannot be known."""
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


def without_broken(images: AnySet, path: Path, notes: list[str]) -> AnySet:
    """The images that can be decoded. Raises LoadError if none can."""
    kept, note = readable(images.paths)
    if not any(kept):
        raise LoadError(f"{path}: none of the {len(kept)} images can be read; give another folder")
    notes += [note] if note else []
    pairs = [(images.paths[index], images.labels[index]) for index, keep in enumerate(kept) if keep]
    return replace(images, paths=tuple(path for path, _ in pairs), labels=tuple(label for _, label in pairs))
