"""`mpcompile doctor MODEL --data`: the dense model's accuracy under the usual preprocessings, best first.

A model whose images are normalised, cropped or ordered otherwise than in training loses accuracy without any error. The
search has two steps: pixel values (mean, deviation, channel order) with the present resize and crop, then resize, crop
and interpolation with the best of these.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest
from torch import Tensor, nn

from mpcompile.data.images import BATCH, Split
from mpcompile.driver.inputs import data_for, loaded_from
from mpcompile.errors import UsageError
from mpcompile.frontend.capture import capture
from mpcompile.frontend.load_model import Request
from mpcompile.ir.model import Source
from mpcompile.measure.changed_answers import SIGNIFICANCE, ChangedAnswers, is_better
from mpcompile.measure.preprocessing_set_ups import (
    SetUp,
    crop_set_ups,
    has_picture_files,
    options_for,
    pixel_set_ups,
    readers,
)
from mpcompile.recipe.schema import DataChoice
from mpcompile.system.progress import Progress, stage_progress, tracked

IMAGES = 200  # labelled images that each set-up is tried on
STAGES = ("load", "capture", "try pixel values", "try resize and crop")


@dataclass(frozen=True, slots=True)
class PreprocessingTrial:
    """The top-1 accuracy of the dense model with one set-up, as a share in [0, 1].

    `options` are those to type for it, beside the present ones; empty for the present set-up.
    """

    name: str
    top1: float
    options: str


@dataclass(frozen=True, slots=True)
class PreprocessingTrials:
    """The trials on `images` labelled images, best first, and a conclusion as a sentence."""

    trials: tuple[PreprocessingTrial, ...]
    images: int
    conclusion: str


def try_preprocessings(
    model: str | Path | nn.Module | Request, data: str | Path, observe: Callable[[Progress], None] | None = None
) -> PreprocessingTrials:
    """The accuracy of a model on up to IMAGES labelled images with each usual preprocessing.

    Args:
        model: a file, a name, a module or a `Request`; its preprocessing is the present one.
        data: a folder of images with labels, or an .npz file.
        observe: called as each stage and each set-up begins.

    Raises UsageError if the images have no labels of the model's outputs, and LoadError if they cannot be read.
    """
    with stage_progress(observe, STAGES) as tell:
        tell("load")
        loaded, leaves = loaded_from(model)
        tell("capture")
        dense = capture(loaded.module, loaded.source, leaves=leaves)
        images = data_for(Path(data), dense, DataChoice(calibration=1, validation=0, held_out=IMAGES))
        if not images.held_out.labelled:
            raise UsageError(f"doctor --data measures accuracy, which needs labelled images; {'; '.join(images.notes)}")
        outputs = dense(dense.example).shape[1]
        right: dict[SetUp, NDArray[np.bool_]] = {}

        def measure(set_ups: tuple[SetUp, ...]) -> None:
            for set_up in tracked(set_ups, lambda one: one.name):
                right[set_up] = _right(dense, images.held_out, loaded.source, set_up)

        tell("try pixel values")
        measure(pixel_set_ups(loaded.source, images.held_out.first(min(BATCH, len(images.held_out)))))
        if has_picture_files(images.held_out.images):
            tell("try resize and crop")
            measure(crop_set_ups(_best(right)))
    return conclude(right, loaded.source, outputs)


def conclude(right: dict[SetUp, NDArray[np.bool_]], present: Source, outputs: int) -> PreprocessingTrials:
    """The table and its conclusion, from which images each set-up got right; the first set-up is the present one.

    A set-up is called better only if the exact McNemar test on the same images says so at SIGNIFICANCE, divided by the
    number of set-ups, since the best of many is looked at (Bonferroni).
    """
    best, first = _best(right), next(iter(right))
    count = len(right[first])
    ordered = sorted(right, key=lambda one: -right[one].mean())  # stable: of equals, the present one first
    trials = tuple(
        PreprocessingTrial(one.name, float(right[one].mean()), options_for(one.source, present)) for one in ordered
    )
    hits = int(right[best].sum())
    limit = SIGNIFICANCE / len(right)
    if binomtest(hits, count, 1 / outputs, alternative="greater").pvalue > limit:
        text = (
            f"no set-up is better than chance on {count} images: are the labels in the model's order, and are these "
            "the model's own weights"
        )
    elif not is_better(right[first], right[best], limit):
        text = f"no set-up is significantly better than the present one on {count} images"
    else:
        p_value = ChangedAnswers.between(right[first], right[best]).chance
        text = f"on {count} images, {best.name} is significantly better than the present set-up (p = {p_value:.1g})"
        text += f"; give {options_for(best.source, present)}"
    return PreprocessingTrials(trials, count, text)


def _right(model: Callable[[Tensor], Tensor], split: Split, present: Source, set_up: SetUp) -> NDArray[np.bool_]:
    """Which images of a split (n,), which have the present preprocessing, the model answers with their label."""
    read, _, transform_of = readers(split.images, present)
    transform = transform_of(set_up.source)
    found = []
    with torch.no_grad():
        for start in range(0, len(split), BATCH):
            pictures = [read(index) for index in split.order[start : start + BATCH]]
            answers = model(torch.stack([transform(picture) for picture, _ in pictures])).argmax(1)
            found.append(answers == torch.tensor([label for _, label in pictures]))
    right: NDArray[np.bool_] = torch.cat(found).numpy()
    return right


def _best(right: dict[SetUp, NDArray[np.bool_]]) -> SetUp:
    """The set-up with the most right answers; of equals, the first."""
    return max(right, key=lambda one: right[one].mean())
