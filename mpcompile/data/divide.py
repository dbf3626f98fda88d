"""Draws the four splits of a run from a set of images, or from a training and a held-out set, by a seed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mpcompile.data.class_names import INSTEAD, no_classes
from mpcompile.data.encoded_images import EncodedImages
from mpcompile.data.images import Data, Images, Split
from mpcompile.data.survey import surveyed
from mpcompile.errors import LoadError


@dataclass(frozen=True, slots=True)
class Numbers:
    """The largest numbers of images of a run, and the seed that draws them; `held_out` is None for all."""

    calibration: int
    validation: int
    held_out: int | None
    seed: int


def divided(
    train: Images, test: Images | None, outputs: int, numbers: Numbers, name: str, given_notes: Sequence[str]
) -> Data:
    """The splits of a run from training images and held-out images; without these, from disjoint parts of one set.

    Without held-out images, if there are no more images than for calibration, half of them calibrate.

    Args:
        train: the images to fit on.
        test: the held-out images, or None.
        outputs: number of outputs of the model, each of them a class; 0 if they are none.
        numbers: how many images to draw, and the seed.
        name: what errors call the data.
        given_notes: the first notes of the data.

    Raises LoadError.
    """
    notes = list(given_notes)
    calibration, validation, held_out = numbers.calibration, numbers.validation, numbers.held_out
    rng = np.random.default_rng(numbers.seed)
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
            f"{name}: all {len(train)} images are used for calibration and none are left as held-out images; "
            "give more images, or a smaller --calibration"
        )
    evaluating = np.sort(evaluating[:held_out])  # in the order of the folder: neighbours on disk are read together
    if len(calibrating) < count:
        notes.append(f"{calibration} calibration images were requested, but there are only {len(calibrating)}")
    training = np.setdiff1d(order if test is not train else calibrating, validating)
    labelled, note = _labels_fit(test, outputs)
    return Data(
        Split(train, tuple(calibrating.tolist()), labelled),
        Split(test, tuple(evaluating.tolist()), labelled),
        (*notes, *note),
        Split(train, tuple(validating.tolist()), labelled),
        Split(train, tuple(training.tolist()), labelled),
    )


def surveyed_files(data: Data) -> Data:
    """The data with notes that count unusual image files, and with the range of files of more than 8 bits.

    Calibration, validation and held-out images are surveyed. Training images may be many more, and are read alike.
    """
    paths = [
        split.images.paths[index]
        for split in (data.calibration, data.validation, data.held_out)
        if isinstance(split.images, EncodedImages)
        for index in split.order
    ]
    if not paths or not isinstance(data.calibration.images, EncodedImages):
        return data
    reading, notes = surveyed(paths, data.calibration.images.reading)
    changed = {id(images): replace(images, reading=reading) for images in _folders_of(data)}
    calibration, validation, training, held_out = (
        replace(split, images=changed[id(split.images)])
        for split in (data.calibration, data.validation, data.training, data.held_out)
    )
    return Data(calibration, held_out, data.notes + notes, validation, training)


def _folders_of(data: Data) -> list[EncodedImages]:
    """The distinct sets of image files of the splits."""
    splits = (data.calibration, data.validation, data.training, data.held_out)
    return list({id(s.images): s.images for s in splits if isinstance(s.images, EncodedImages)}.values())


def _labels_fit(images: Images, outputs: int) -> tuple[bool, list[str]]:
    """Whether the labels are the model's outputs, so that accuracy can be measured, and notes on why not."""
    if images.classes == outputs > 0:
        return True, []
    if isinstance(images, EncodedImages):
        return False, []  # read_folders has noted why
    if not outputs:
        return False, [f"{no_classes(images.classes)}: {INSTEAD}"]
    return False, [f"the images have {images.classes} classes, the model {outputs} outputs: {INSTEAD}"]
