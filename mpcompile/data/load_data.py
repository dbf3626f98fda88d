"""What --data names -> calibration, validation, training and held-out images.

What `--data` may be:

- a folder with `train/` and one of `val/`, `validation/` or `test/`, each with a folder per class;
- a folder with a folder per class: shuffled by the seed, calibration images first, held-out images after them;
- a folder of images without classes: the same, without labels, so agreement is measured and not accuracy;
- an .npz file with `calibration_images`, `calibration_labels`, `heldout_images`, `heldout_labels`: bytes of shape
  (n, h, w) or (n, h, w, c), and integers.

Folders are read by timm's reader and transforms with the preprocessing of the model. Unlike timm's own dataset,
an image that cannot be read is an error here and not a skipped sample.
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
    """The images at `path`, preprocessed for a model with that many outputs.

    At most that many images are taken, chosen by `seed`; of one pool, validation gets at most a fifth of what
    calibration leaves. Raises LoadError.
    """
    try:
        exists = path.exists()
    except (OSError, ValueError) as error:  # too long, no permission, or a byte that names cannot have
        raise LoadError(f"{path} cannot be looked up: {error}") from error
    if not exists:
        raise LoadError(f"{path} does not exist; --data takes a folder of images or an .npz file")
    if not path.is_file() and not path.is_dir():
        raise LoadError(f"{path} is a pipe or a device; --data takes a folder of images or an .npz file")
    notes: list[str] = []
    train, test = read_npz(path, source, outputs) if path.is_file() else read_folders(path, source, notes)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(train))
    chosen, left = order[:calibration], order[calibration:]
    if test is None:  # one pool: disjoint shares of it
        deciding = left[: min(validation, len(left) // 5)]
        test, rest = train, left[len(deciding) :]
    else:
        deciding = left[:validation]
        rest = rng.permutation(len(test))
    if not len(rest):
        raise LoadError(
            f"{path}: all {len(train)} images are taken for calibration and none are left to evaluate on; "
            "give more images, or fewer with --calibration"
        )
    rest = np.sort(rest[:held_out])  # in the order of the folder: neighbours on disk are read together
    if len(chosen) < calibration:
        notes.append(f"{calibration} calibration images were asked for, {len(chosen)} are there")
    labelled, note = _labels_fit(test, outputs)
    return Data(
        Split(train, tuple(chosen.tolist()), labelled),
        Split(test, tuple(rest.tolist()), labelled),
        tuple(notes + note),
        Split(train, tuple(deciding.tolist()), labelled),
        Split(train, tuple(np.setdiff1d(order if test is not train else chosen, deciding).tolist()), labelled),
    )


def _labels_fit(images: Images, outputs: int) -> tuple[bool, list[str]]:
    """Whether the labels are the model's outputs, and a note where they are not or there are none."""
    if images.classes == outputs > 0:
        return True, []
    instead = "agreement with the dense model is measured instead of accuracy"
    if images.classes == 0:
        return False, [f"the images have no labels: {instead}"]
    return False, [f"the images have {images.classes} classes, the model {outputs} outputs: {instead}"]
