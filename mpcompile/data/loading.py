"""The value of --data -> calibration, validation, training and held-out images.

`--data` takes one of these:

- a folder with `train/` and one of `val/`, `validation/` or `test/`, each with one subfolder per class;
- a folder with one subfolder per class: its images are shuffled by the seed and divided;
- a folder of images without subfolders: the same, without labels, so agreement is measured instead of accuracy;
- an .npz file with `calibration_images`, `calibration_labels`, `heldout_images` and `heldout_labels`: images are uint8
  of shape (n, h, w) or (n, h, w, c), labels are integers of shape (n,).

Folders are read by timm's reader, and images are preprocessed as the model's `source` says. timm's own dataset skips an
image that cannot be read; here it is an error.
"""

from pathlib import Path

import numpy as np

from mpcompile.data.folder import read_folders
from mpcompile.data.images import Data, Images, Split
from mpcompile.data.npz import read_npz
from mpcompile.errors import LoadError
from mpcompile.ir.model import Source


def load_data(
    path: Path,
    source: Source,
    outputs: int,
    calibration: int = 256,
    held_out: int | None = None,
    seed: int = 0,
    validation: int = 256,
) -> Data:
    """The images at `path`, preprocessed for a model and divided into calibration, validation, training and held-out.

    Args:
        path: a folder of images, or an .npz file.
        source: preprocessing of the model.
        outputs: number of outputs of the model. Labels are used only if there are as many classes.
        calibration: largest number of calibration images.
        held_out: largest number of held-out images; None takes all.
        seed: decides which images are taken.
        validation: largest number of validation images. If the folder has no `train/`, at most a fifth of the images
            that are not for calibration are taken.

    Raises LoadError.
    """
    try:
        exists = path.exists()
    except (OSError, ValueError) as error:  # the name is too long or has a zero byte, or permission is missing
        raise LoadError(f"{path} cannot be looked up: {error}") from error
    if not exists:
        raise LoadError(f"{path} does not exist; --data takes a folder of images or an .npz file")
    if not path.is_file() and not path.is_dir():
        raise LoadError(f"{path} is a pipe or a device; --data takes a folder of images or an .npz file")
    notes: list[str] = []
    train, test = read_npz(path, source, outputs) if path.is_file() else read_folders(path, source, notes)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(train))
    calibrating, left = order[:calibration], order[calibration:]
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
    if len(calibrating) < calibration:
        notes.append(f"{calibration} calibration images were requested, but there are only {len(calibrating)}")
    training = np.setdiff1d(order if test is not train else calibrating, validating)
    labelled, note = _labels_fit(test, outputs)
    return Data(
        Split(train, tuple(calibrating.tolist()), labelled),
        Split(test, tuple(evaluating.tolist()), labelled),
        tuple(notes + note),
        Split(train, tuple(validating.tolist()), labelled),
        Split(train, tuple(training.tolist()), labelled),
    )


def _labels_fit(images: Images, outputs: int) -> tuple[bool, list[str]]:
    """Whether the classes are the model's outputs; if not, with a note for the report."""
    if images.classes == outputs > 0:
        return True, []
    instead = "agreement with the dense model is measured instead of accuracy"
    if images.classes == 0:
        return False, [f"the images have no labels: {instead}"]
    return False, [f"the images have {images.classes} classes, the model {outputs} outputs: {instead}"]
