"""Checks whether the accuracy measured for the dense model can be right, before anything is compared with it.

A wrong order of labels, a wrong preprocessing or the wrong file give the dense and the compressed model the same low
accuracy, so that a gate on the difference would pass. Five findings contradict the measurement:

- **Order of the labels.** Other labels make many more images right (mpcompile/measure/label_order.py), or many labels
  rank far behind where the model is confident.
- **Confidence.** The model is confident, and right no more often than decisions that are independent of the labels,
  or far less often than its confidence says, on all images or on those with a high confidence.
- **Chance.** The model is right no more often than such decisions, on so many images that a loss cannot be measured.
- **Claim.** The checkpoint records an accuracy, and the measured one is far below it.
- **Constant outputs.** The outputs do not depend on the image.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mpcompile.ir.head import Head
from mpcompile.ir.parity import is_constant
from mpcompile.measure.changed_answers import is_better
from mpcompile.measure.label_order import reordered_right, shifted_right

ABOVE_CHANCE = 0.01  # p-value from which accuracy is not above chance
CONTRADICTION = 1e-4  # p-value below which an observation contradicts the measured accuracy: a rare false alarm
SMALLEST_GAIN = 0.02  # of a reordering, as a share of the images
FAR_BELOW = 0.10  # a claimed accuracy, as a share of the images
OVERCONFIDENT = 0.30  # confidence minus accuracy; trained models rarely exceed 0.15 on the images they are made for
FAR_RANK, LEAST_RANK = 0.05, 10  # share of the outputs, and their least number, that a wrong label ranks behind
MISLABELLED = 0.05  # share of confident decisions; of ImageNet's labels, fewer are wrong and so far from the right one
FEWEST = 8  # images, below which nothing can be told
CONFIDENT = 0.9  # confidence of a decision; trained models, also overfitted ones, are then mostly right
PREPROCESSING = "the preprocessing (mean, deviation, size, interpolation, crop, channel order)"


@dataclass(frozen=True, slots=True)
class DenseCheck:
    """Numbers that tell whether the dense model's accuracy can be right; all but `reasons` are shares in [0, 1].

    `chance` is the accuracy of decisions with the same frequencies that are independent of the labels. `confidence` is
    the mean probability that the model gives to its decision. `reordered` is the accuracy after outputs are matched to
    labels one to one. `commonest` is the share of the most frequent decision. `claimed` is the accuracy that the
    checkpoint records. Each is None if it is not known. `reasons` are the contradictions, and `remarks` are unusual
    findings that contradict nothing; both are sentences without period.
    """

    chance: float | None
    confidence: float | None
    reordered: float | None
    commonest: float | None
    claimed: float | None
    reasons: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def check_dense(
    outputs: NDArray[np.float32], labels: NDArray[np.int64] | None, head: Head, claimed: float | None = None
) -> DenseCheck:
    """The check of the dense model's outputs (images, outputs); `labels` (images,), or None if there are none.

    For multilabel heads and outputs with more axes, only constant outputs are noticed.
    """
    decided = head.decisions(outputs)
    if is_constant(outputs):
        return constant_check(len(outputs), claimed)
    if decided.ndim > 1:
        return DenseCheck(None, None, None, None, claimed)
    values, counts = np.unique(decided, return_counts=True)
    commonest, most = float(counts.max() / len(decided)), int(values[counts.argmax()])
    remarks = []
    if len(values) == 1 and len(decided) >= FEWEST:
        remarks.append(f"the dense model gives the same decision, {most}, for all {len(decided):,} held-out images")
    if labels is None or len(labels) < FEWEST:
        return DenseCheck(None, None, None, commonest, claimed, (), tuple(remarks))
    right = decided == labels
    confidences = confidences_of(outputs, head)
    shares = [(labels == value).mean() for value in values]
    reordered = reordered_right(decided, labels)
    found = DenseCheck(
        chance=float(np.dot(counts / len(decided), shares)),
        confidence=None if confidences is None else float(confidences.mean()),
        reordered=None if reordered is None else float(reordered.mean()),
        commonest=commonest,
        claimed=claimed,
    )
    reason = (
        _wrong_order(decided, labels, reordered)
        or _wrong_accuracy(found, right, confidences, reordered, most)
        or _wrong_labels(outputs, labels, confidences, head)
    )
    if reason is None and _by_chance(found, right):
        remarks.append(
            f"the dense model is right on {right.mean():.2%} of {len(right):,} held-out images, which is not above "
            f"chance ({found.chance:.2%})"
        )
    return replace(found, reasons=() if reason is None else (reason,), remarks=tuple(remarks))


def _by_chance(found: DenseCheck, right: NDArray[np.bool_]) -> bool:
    """Whether the number of right images is not significantly above chance."""
    from scipy.stats import binomtest

    if found.chance is None or found.chance >= 1:
        return False
    return bool(binomtest(int(right.sum()), len(right), found.chance, "greater").pvalue > ABOVE_CHANCE)


def _wrong_order(
    decided: NDArray[np.int64], labels: NDArray[np.int64], reordered: NDArray[np.bool_] | None
) -> str | None:
    """A sentence on labels under which significantly more images are right; None if there are none."""
    right = decided == labels
    shift, shifted = shifted_right(decided, labels)
    ways = [] if reordered is None else [(reordered, "if outputs are matched to labels one to one")]
    ways += [(shifted, f"if {shift}")] if shift is not None else []
    found = [(after, way) for after, way in ways if is_better(right, after, CONTRADICTION, SMALLEST_GAIN)]
    if not found:
        return None
    after, way = max(found, key=lambda pair: pair[0].sum())
    return (
        f"the dense model is right on {right.mean():.2%} of {len(right):,} held-out images, and on {after.mean():.2%} "
        f"{way}: the order of the labels is wrong, or the images are not of the model's classes. Name the class "
        "folders as the model names its labels, or number them in the order of its outputs"
    )


def _wrong_accuracy(
    found: DenseCheck,
    right: NDArray[np.bool_],
    confidences: NDArray[np.float64] | None,
    reordered: NDArray[np.bool_] | None,
    most: int,
) -> str | None:
    """A sentence on why so few images cannot be right, with the numbers that point to its cause; None if they can."""
    from scipy.stats import binom

    hits, count = int(right.sum()), len(right)
    subject = f"the dense model is right on {right.mean():.2%} of {count:,} held-out images"
    matched = "" if reordered is None else f"; {reordered.mean():.2%} with outputs matched to labels one to one"
    numbers = f"({found.commonest:.0%} of the decisions are {most}{matched})"
    expected, by_chance = found.confidence or 0.0, _by_chance(found, right)
    confident_by_chance = by_chance and binom.cdf(hits, count, expected) < CONTRADICTION
    if confident_by_chance or _far_fewer(right, expected):
        chance = f", no more than by chance ({found.chance:.2%})," if by_chance else ""
        return (
            f"{subject}{chance} with a mean confidence of {expected:.0%} {numbers}: its accuracy cannot be right. "
            f"Check {PREPROCESSING}, and whether the file is the model for these images"
        )
    sure = np.zeros(count, bool) if confidences is None else confidences > CONFIDENT
    if confidences is not None and sure.any() and _far_fewer(right[sure], float(confidences[sure].mean())):
        return (
            f"{subject}, and on {right[sure].mean():.2%} of the {sure.sum():,} on which its confidence is above "
            f"{CONFIDENT:.0%} {numbers}: its accuracy cannot be right. Check the labels and their order, "
            f"and {PREPROCESSING}"
        )
    useful = (found.chance or 0.0) + FAR_BELOW
    if by_chance and useful < 1 and binom.cdf(hits, count, useful) < CONTRADICTION:
        return (
            f"{subject}, no more than by chance ({found.chance:.2%}) {numbers}: it has no accuracy to lose. "
            f"Check whether the file has trained weights for these images, the order of the labels, and {PREPROCESSING}"
        )
    floor = (found.claimed or 0.0) - FAR_BELOW
    if floor > 0 and binom.cdf(hits, count, floor) < CONTRADICTION:
        return (
            f"{subject}, and its checkpoint records {found.claimed:.2%} {numbers}. Check {PREPROCESSING}, the order "
            "of the labels, and whether the images are those that the record is about"
        )
    return None


def constant_check(images: int, claimed: float | None = None) -> DenseCheck:
    """The check of a dense model that returns the same outputs for all held-out images."""
    text = f"the dense model returns the same outputs for all {images:,} held-out images: check the file and "
    return DenseCheck(None, None, None, 1.0, claimed, (text + PREPROCESSING,))


def _wrong_labels(
    outputs: NDArray[np.float32], labels: NDArray[np.int64], confidences: NDArray[np.float64] | None, head: Head
) -> str | None:
    """A sentence on labels that the model, where it is confident, ranks behind many other classes; None if few are."""
    from scipy.stats import binom

    far = int(outputs.shape[1] * FAR_RANK)
    if head.kind != "softmax" or confidences is None or far < LEAST_RANK:
        return None
    sure = confidences > CONFIDENT
    rank = (outputs[sure] > np.take_along_axis(outputs[sure], labels[sure, None], axis=1)).sum(axis=1)
    wrong, count = int((rank >= far).sum()), int(sure.sum())
    if binom.sf(wrong - 1, count, MISLABELLED) >= CONTRADICTION:
        return None
    return (
        f"the labels of {wrong:,} of the {count:,} held-out images on which the dense model's confidence is above "
        f"{CONFIDENT:.0%} rank behind {far} or more of its other classes: the labels of some classes are wrong. Name "
        "the class folders as the model names its labels, or number them in the order of its outputs"
    )


def _far_fewer(right: NDArray[np.bool_], confidence: float) -> bool:
    """Whether significantly fewer answers are right than the mean confidence says, less OVERCONFIDENT."""
    from scipy.stats import binom

    least = confidence - OVERCONFIDENT
    return least > 0 and bool(binom.cdf(int(right.sum()), len(right), least) < CONTRADICTION)


def confidences_of(outputs: NDArray[np.float32], head: Head) -> NDArray[np.float64] | None:
    """The probability that a model gives to each decision (images,); None for a head without such a probability."""
    values = outputs.astype(np.float64)
    found: NDArray[np.float64]
    if head.kind == "softmax":
        found = values.max(axis=1)
        if not head.probabilities:
            found = 1 / np.exp(values - found[:, None]).sum(axis=1)
        return found
    if head.kind == "sigmoid":
        one = values[:, 0] if head.probabilities else 1 / (1 + np.exp(-np.clip(values[:, 0], -700, 700)))
        found = np.where(values[:, 0] > head.threshold, one, 1 - one)
        return found
    return None
