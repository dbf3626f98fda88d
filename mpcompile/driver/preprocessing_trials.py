"""`mpcompile doctor MODEL --data`: the dense model's accuracy under the usual preprocessings, best first.

A model whose images are normalised, cropped or ordered otherwise than in training loses accuracy without any error. The
search has two steps: pixel values (mean, deviation, channel order) with the present resize and crop, then resize, crop
and interpolation with the best of these.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest
from torch import Tensor, nn

from mpcompile.analysis.output_head import with_head
from mpcompile.data.folder import FolderImages
from mpcompile.data.images import Split
from mpcompile.data.npz import ArrayImages
from mpcompile.data.transform import evaluation_transform
from mpcompile.driver.inputs import EXAMINED_IMAGES, data_for, loaded_from, with_fitting_labels
from mpcompile.errors import UsageError
from mpcompile.frontend.capture import capture
from mpcompile.frontend.load_model import Request
from mpcompile.frontend.preprocessing import per_channel
from mpcompile.frontend.presets import PRESETS
from mpcompile.ir.head import head_for
from mpcompile.ir.model import Model, Source
from mpcompile.measure.accuracy import SIGNIFICANCE, ChangedAnswers
from mpcompile.recipe.schema import DataChoice
from mpcompile.report.sentences import accuracy_name
from mpcompile.system.progress import Progress, stage_progress, tracked

IMAGES = 200  # labelled images that each set-up is tried on
STAGES = ("load", "capture", "try pixel values", "try resize and crop")
IMAGENET = PRESETS["imagenet"]
# Name, mean and deviation for pixels in [0, 1]. A deviation of 1/255 gives the model pixels in [0, 255].
PIXEL_VALUES = (
    ("ImageNet", IMAGENET.mean, IMAGENET.std),
    ("CIFAR-10", PRESETS["cifar10"].mean, PRESETS["cifar10"].std),
    ("CLIP", PRESETS["clip"].mean, PRESETS["clip"].std),
    ("0.5 / 0.5", (0.5,) * 3, (0.5,) * 3),
    ("[0, 1]", (0.0,) * 3, (1.0,) * 3),
    ("[0, 255]", (0.0,) * 3, (0.00392157,) * 3),
    ("[0, 255] less ImageNet's mean", IMAGENET.mean, (0.00392157,) * 3),
)


@dataclass(frozen=True, slots=True, eq=False)
class SetUp:
    """A preprocessing to try, as a Source, and its name. Compared by identity: a Source has no hash."""

    name: str
    source: Source


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
        data: a folder of images with labels, or an .npz file.
        observe: called as each stage and each set-up begins.
        head: how outputs become a decision (`HeadChoice.parse`).

    Raises UsageError if the head does not fit the outputs, or if the images have no labels of the model's outputs;
    LoadError if they cannot be read.
    """
    with stage_progress(observe, STAGES) as tell:
        tell("load")
        loaded, leaves = loaded_from(model)
        tell("capture")
        dense = capture(loaded.module, loaded.source, leaves=leaves)
        images = data_for(Path(data), dense, DataChoice(calibration=1, validation=0, held_out=IMAGES), head)
        dense, notes = with_head(dense, head, images.held_out.first(min(EXAMINED_IMAGES, len(images.held_out))))
        images = with_fitting_labels(images, dense.head)
        if not images.held_out.labelled:
            raise UsageError(f"doctor --data measures accuracy, which needs labelled images; {'; '.join(images.notes)}")
        right: dict[SetUp, NDArray[np.bool_]] = {}

        def measure(set_ups: tuple[SetUp, ...]) -> None:
            for set_up in tracked(set_ups, lambda one: one.name):
                right[set_up] = _right(dense, preprocessed(images.held_out, set_up.source))

        tell("try pixel values")
        measure(pixel_set_ups(loaded.source))
        if not isinstance(images.held_out.images, ArrayImages):  # arrays have the input's size
            tell("try resize and crop")
            measure(crop_set_ups(_best(right)))
        labels = torch.cat([labels for _, labels in images.held_out.batches()])
        found = conclude(right, loaded.source, _chance(labels, dense))
    return replace(found, measure=accuracy_name(dense.head), notes=notes)


def _chance(labels: Tensor, dense: Model) -> float:
    """The accuracy of a decision that does not depend on the image: a random class, or the most frequent decision."""
    if dense.head is None or dense.head.kind == "softmax":
        return 1 / dense(dense.example).shape[1]
    counts = labels.unique(dim=0, return_counts=True)[1]
    return float(counts.max() / counts.sum())


def pixel_set_ups(present: Source) -> tuple[SetUp, ...]:
    """The present preprocessing, then the usual means and deviations, each in RGB and in BGR; none twice."""
    channels = present.size[0]
    usual = [
        SetUp(name, replace(present, mean=per_channel(mean, channels), std=per_channel(std, channels)))
        for name, mean, std in PIXEL_VALUES
        if mean is not None and std is not None
    ]
    rows = [SetUp(_name_of(present), present)]
    rows += [replace(row, source=replace(row.source, channel_order="rgb")) for row in usual]
    if channels == 3:
        rows += [SetUp(f"{row.name}, {_other(row.source).upper()}", _reversed(row.source)) for row in tuple(rows)]
    return _distinct(rows)


def crop_set_ups(best: SetUp) -> tuple[SetUp, ...]:
    """The other usual ways to resize and crop, with the pixel values of the best set-up."""
    height, width = best.source.size[1:]
    rows = []
    for interpolation in dict.fromkeys((best.source.interpolation, "bilinear", "bicubic")):
        source, name = replace(best.source, interpolation=interpolation), f"{best.name}, {interpolation}"
        cropped = replace(source, resize=None, keep_exact=False)
        rows += [
            SetUp(name, source),
            SetUp(f"{name}, no crop", replace(cropped, crop_pct=1.0)),
            SetUp(f"{name}, crop 0.875", replace(cropped, crop_pct=0.875)),
            SetUp(f"{name}, both sides resized", replace(cropped, resize=(height, width))),
        ]
    return tuple(row for row in _distinct([best, *rows]) if row.source != best.source)


def preprocessed(split: Split, source: Source) -> Split:
    """The same images, preprocessed for a model of another source with the same input size."""
    images = split.images
    if isinstance(images, ArrayImages):
        mean, std = torch.tensor(source.mean), torch.tensor(source.std)
        return replace(split, images=replace(images, mean=mean, std=std, channel_order=source.channel_order))
    if isinstance(images, FolderImages):
        return replace(split, images=replace(images, transform=evaluation_transform(source)))
    raise TypeError(f"{type(images).__name__} is neither a folder of images nor an .npz file")


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
    p_value = ChangedAnswers.between(right[first], right[best]).chance
    hits = int(right[best].sum())
    limit = SIGNIFICANCE / len(right)
    if chance < 1 and binomtest(hits, count, chance, alternative="greater").pvalue > limit:
        text = (
            f"no set-up is better than chance on {count} images: are the labels in the model's order, and are these "
            "the model's own weights"
        )
    elif best == first or p_value > limit:
        text = f"no set-up is significantly better than the present one on {count} images"
    else:
        text = f"on {count} images, {best.name} is significantly better than the present set-up (p = {p_value:.1g})"
        text += f"; give {options_for(best.source, present)}"
    return PreprocessingTrials(trials, count, text)


def options_for(source: Source, present: Source) -> str:
    """The options that change the preprocessing of one source into that of another; empty if there is no difference."""
    options = [
        f"--{name} {','.join(f'{value:.9g}' for value in getattr(source, name))}"
        for name in ("mean", "std")
        if getattr(source, name) != getattr(present, name)
    ]
    if source.channel_order != present.channel_order:
        options.append(f"--channel-order {source.channel_order}")
    if source.resize is not None and source.resize != present.resize:
        options.append(f"--resize {'x'.join(map(str, source.resize))}")
    elif source.resize is None and (
        (source.crop_pct, source.keep_exact) != (present.crop_pct, present.keep_exact) or present.resize is not None
    ):
        options.append(f"--crop-pct {source.crop_pct:g}")
    if source.interpolation != present.interpolation:
        options.append(f"--interpolation {source.interpolation}")
    return " ".join(options)


def _right(model: Model, split: Split) -> NDArray[np.bool_]:
    """Which images of a split (n,) the model decides as they are labelled."""
    with torch.no_grad():
        outputs = [(model(images), labels) for images, labels in split.batches()]
    answers = [head_for(model.head, z).right(z, labels) for z, labels in outputs]
    found: NDArray[np.bool_] = torch.cat(answers).numpy()
    return found


def _best(right: dict[SetUp, NDArray[np.bool_]]) -> SetUp:
    """The set-up with the most right answers; of equals, the first."""
    return max(right, key=lambda one: right[one].mean())


def _name_of(present: Source) -> str:
    names = {"architecture": "assumed (the architecture's)", "assumed": "assumed (ImageNet's)", "recorded": "recorded"}
    return f"present: {names.get(present.preprocessing, present.preprocessing)}"


def _other(source: Source) -> str:
    return "bgr" if source.channel_order == "rgb" else "rgb"


def _reversed(source: Source) -> Source:
    """The source with the other channel order; mean and deviation stay with their colours."""
    return replace(source, channel_order=_other(source), mean=source.mean[::-1], std=source.std[::-1])


def _distinct(rows: list[SetUp]) -> tuple[SetUp, ...]:
    """The set-ups without those whose source came before."""
    seen: Iterator[SetUp] = (row for i, row in enumerate(rows) if all(row.source != one.source for one in rows[:i]))
    return tuple(seen)
