"""`mpcompile doctor MODEL --data`: the dense model's accuracy under the usual preprocessings, best first.

A model whose images are normalised, cropped or ordered otherwise than in training loses accuracy without any error. The
search has two steps: pixel values (mean, deviation, channel order) with the present resize and crop, then resize, crop
and interpolation with the best of these.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest
from torch import Tensor, nn

from mpcompile.analysis.output_head import with_head
from mpcompile.data.images import BATCH, Split
from mpcompile.driver.inputs import EXAMINED_IMAGES, captured, data_for, loaded_from, with_fitting_labels
from mpcompile.errors import UsageError
from mpcompile.frontend.load_model import Request
from mpcompile.ir.head import head_for
from mpcompile.ir.model import Model
from mpcompile.ir.source import Source
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
from mpcompile.report.head_words import accuracy_name
from mpcompile.system.progress import Progress, stage_progress, tracked

IMAGES = 200  # labelled images that each set-up is tried on
STAGES = ("load", "capture", "try pixel values", "try resize and crop")


@dataclass(frozen=True, slots=True)
class PreprocessingTrial:
    """The accuracy of the dense model with one set-up, as a share in [0, 1]: right decisions of its head.

    `options` are those to type for it, beside the present ones; empty for the present set-up.
    """

    name: str
    top1: float
    options: str


@dataclass(frozen=True, slots=True)
class PreprocessingTrials:
    """The trials on `images` labelled images, best first, and a conclusion as a sentence.

    `measure` names the accuracy: top-1, or that of a threshold. `notes` are about the outputs of the model.
    """

    trials: tuple[PreprocessingTrial, ...]
    images: int
    conclusion: str
    measure: str = "top-1"
    notes: tuple[str, ...] = ()


def try_preprocessings(
    model: str | Path | nn.Module | Request,
    data: str | Path,
    observe: Callable[[Progress], None] | None = None,
    *,
    head: str = "auto",
) -> PreprocessingTrials:
    """The accuracy of a model on up to IMAGES labelled images with each usual preprocessing.

    Args:
        model: a file, a name, a module or a `Request`; its preprocessing is the present one.
        data: a folder of images with labels, an .npz file, or a dataset such as `hfds/NAME`.
        observe: called as each stage and each set-up begins.
        head: how outputs become a decision (`HeadChoice.parse`).

    Raises UsageError if the head does not fit the outputs, or if the images have no labels of the model's outputs;
    LoadError if they cannot be read.
    """
    with stage_progress(observe, STAGES) as tell:
        tell("load")
        loaded, request = loaded_from(model)
        tell("capture")
        dense = captured(loaded, request)
        images = data_for(data, dense, DataChoice(calibration=1, validation=0, held_out=IMAGES), head)
        dense, notes = with_head(dense, head, images.held_out.first_inputs(min(EXAMINED_IMAGES, len(images.held_out))))
        images = with_fitting_labels(images, dense)
        if not images.held_out.labelled:
            raise UsageError(f"doctor --data measures accuracy, which needs labelled images; {'; '.join(images.notes)}")
        right: dict[SetUp, NDArray[np.bool_]] = {}

        def measure(set_ups: tuple[SetUp, ...]) -> None:
            for set_up in tracked(set_ups, lambda one: one.name, "set-ups"):
                right[set_up] = _right(dense, images.held_out, loaded.source, set_up)

        tell("try pixel values")
        measure(pixel_set_ups(loaded.source, images.held_out.first(min(BATCH, len(images.held_out)))))
        if has_picture_files(images.held_out.images):
            tell("try resize and crop")
            measure(crop_set_ups(_best(right)))
        labels = torch.cat([labels for _, labels in images.held_out.batches()])
        found = conclude(right, loaded.source, _chance(labels, dense))
    return replace(found, measure=accuracy_name(dense.head), notes=notes)


def _chance(labels: Tensor, dense: Model) -> float:
    """The accuracy of a decision that does not depend on the image: a random class, or the most frequent decision."""
    if dense.head is None or dense.head.kind == "softmax":
        return 1 / dense(dense.example_inputs).shape[1]
    counts = labels.unique(dim=0, return_counts=True)[1]
    return float(counts.max() / counts.sum())


def conclude(right: dict[SetUp, NDArray[np.bool_]], present: Source, chance: float) -> PreprocessingTrials:
    """The table and its conclusion, from which images each set-up got right; the first set-up is the present one.

    A set-up is called better only if the exact McNemar test on the same images says so at SIGNIFICANCE, divided by the
    number of set-ups, since the best of many is looked at (Bonferroni). `chance` is the accuracy without the images.
    """
    best, first = _best(right), next(iter(right))
    count = len(right[first])
    ordered = sorted(right, key=lambda one: -right[one].mean())  # stable: of equals, the present one first
    trials = tuple(
        PreprocessingTrial(one.name, float(right[one].mean()), options_for(one.source, present)) for one in ordered
    )
    hits = int(right[best].sum())
    limit = SIGNIFICANCE / len(right)
    if chance < 1 and binomtest(hits, count, chance, alternative="greater").pvalue > limit:
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


def _right(model: Model, split: Split, present: Source, set_up: SetUp) -> NDArray[np.bool_]:
    """Which images of a split (n,), which have the present preprocessing, the model decides as they are labelled."""
    read, _, transform_of = readers(split.images, present)
    transform = transform_of(set_up.source)
    found = []
    for start in range(0, len(split), BATCH):
        pictures = [read(index) for index in split.order[start : start + BATCH]]
        outputs = model(torch.stack([transform(picture) for picture, _ in pictures]))
        found.append(head_for(model.head, outputs).right(outputs, torch.tensor([label for _, label in pictures])))
    right: NDArray[np.bool_] = torch.cat(found).numpy()
    return right


def _best(right: dict[SetUp, NDArray[np.bool_]]) -> SetUp:
    """The set-up with the most right answers; of equals, the first."""
    return max(right, key=lambda one: right[one].mean())
