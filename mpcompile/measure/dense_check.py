"""Checks whether the accuracy measured for the dense model can be right, before anything is compared with it.

A wrong order of labels, a wrong preprocessing or the wrong file give the dense and the compressed model the same low
accuracy, so that a gate on the difference would pass. Four findings contradict the measurement:

- **Order of the labels.** Matching outputs to labels one to one makes many more images right. The match is the
  assignment that maximises the confusion matrix of one half of the images; it is counted on the other half.
- **Confidence.** The model is confident, and right no more often than decisions that are independent of the labels,
  or far less often than its confidence says.
- **Claim.** The checkpoint records an accuracy, and the measured one is far below it.
- **Constant outputs.** The outputs do not depend on the image.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mpcompile.ir.head import Head
from mpcompile.ir.parity import is_constant

ABOVE_CHANCE = 0.01  # p-value from which accuracy is not above chance
CONTRADICTION = 1e-4  # p-value below which an observation contradicts the measured accuracy: a rare false alarm
SMALLEST_GAIN = 0.02  # of a reordering, as a share of the images
FAR_BELOW = 0.10  # a claimed accuracy, as a share of the images
OVERCONFIDENT = 0.30  # confidence minus accuracy; trained models rarely exceed 0.15 on the images they are made for
FEWEST = 8  # images, below which nothing can be told
MOST_CLASSES = 2500  # of an assignment problem, which takes seconds at this size
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
        text = f"the dense model returns the same outputs for all {len(outputs):,} held-out images: check the file and "
        return DenseCheck(None, None, None, 1.0, claimed, (text + PREPROCESSING,))
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
    shares = [(labels == value).mean() for value in values]
    reordered = reordered_right(decided, labels)
    found = DenseCheck(
        chance=float(np.dot(counts / len(decided), shares)),
        confidence=confidence_of(outputs, head),
        reordered=None if reordered is None else float(reordered.mean()),
        commonest=commonest,
        claimed=claimed,
    )
    reasons = _contradictions(found, right, reordered, most)
    if not reasons and _by_chance(found, right):
        remarks.append(
            f"the dense model is right on {right.mean():.2%} of {len(right):,} held-out images, which is not above "
            f"chance ({found.chance:.2%})"
        )
    return replace(found, reasons=tuple(reasons), remarks=tuple(remarks))


def _by_chance(found: DenseCheck, right: NDArray[np.bool_]) -> bool:
    """Whether the number of right images is not significantly above chance."""
    from scipy.stats import binomtest

    if found.chance is None or found.chance >= 1:
        return False
    return bool(binomtest(int(right.sum()), len(right), found.chance, "greater").pvalue > ABOVE_CHANCE)


def _contradictions(
    found: DenseCheck, right: NDArray[np.bool_], reordered: NDArray[np.bool_] | None, most: int
) -> list[str]:
    """The strongest contradiction, with the numbers that point to its cause; empty if there is none."""
    from scipy.stats import binom

    hits, count = int(right.sum()), len(right)
    subject = f"the dense model is right on {right.mean():.2%} of {count:,} held-out images"
    matched = "" if reordered is None else f"; {reordered.mean():.2%} with outputs matched to labels one to one"
    numbers = f"({found.commonest:.0%} of the decisions are {most}{matched})"
    if reordered is not None and reordered.mean() - right.mean() >= SMALLEST_GAIN:
        gained, lost = int((reordered & ~right).sum()), int((right & ~reordered).sum())
        if binom.cdf(lost, gained + lost, 0.5) < CONTRADICTION:
            return [
                f"{subject}, and on {reordered.mean():.2%} if outputs are matched to labels one to one: the order of "
                "the labels is wrong, or the images are not of the model's classes. Name the class folders as the "
                "model names its labels, or number them in the order of its outputs"
            ]
    expected = found.confidence or 0.0
    by_chance = _by_chance(found, right) and binom.cdf(hits, count, expected) < CONTRADICTION
    if by_chance or (expected > OVERCONFIDENT and binom.cdf(hits, count, expected - OVERCONFIDENT) < CONTRADICTION):
        chance = f", no more than by chance ({found.chance:.2%})," if by_chance else ""
        return [
            f"{subject}{chance} with a mean confidence of {expected:.0%} {numbers}: its accuracy cannot be right. "
            f"Check {PREPROCESSING}, and whether the file is the model for these images"
        ]
    floor = (found.claimed or 0.0) - FAR_BELOW
    if floor > 0 and binom.cdf(hits, count, floor) < CONTRADICTION:
        return [
            f"{subject}, and its checkpoint records {found.claimed:.2%} {numbers}. Check {PREPROCESSING}, the order "
            "of the labels, and whether the images are those that the record is about"
        ]
    return []


def confidence_of(outputs: NDArray[np.float32], head: Head) -> float | None:
    """The mean probability that a model gives to its decisions; None for a head without one probability for each."""
    values = outputs.astype(np.float64)
    if head.kind == "softmax":
        if head.probabilities:
            return float(values.max(axis=1).mean())
        powers = np.exp(values - values.max(axis=1, keepdims=True))
        return float((1 / powers.sum(axis=1)).mean())
    if head.kind == "sigmoid":
        one = values[:, 0] if head.probabilities else 1 / (1 + np.exp(-np.clip(values[:, 0], -700, 700)))
        above = values[:, 0] > head.threshold
        return float(np.where(above, one, 1 - one).mean())
    return None


def reordered_right(decided: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.bool_] | None:
    """Whether each decision is right after outputs are matched to labels; None with more than MOST_CLASSES classes.

    The match maximises the number of right images in one half, the even or the odd positions, and is counted on the
    other half, so that it does not fit its own images. A class that no other output answers better keeps its output.
    """
    from scipy.optimize import linear_sum_assignment

    values, codes = np.unique(np.concatenate([decided, labels]), return_inverse=True)
    if len(values) > MOST_CLASSES:
        return None
    outputs, wanted = codes[: len(decided)], codes[len(decided) :]
    right = np.zeros(len(labels), bool)
    for half in (0, 1):
        confusion = np.eye(len(values)) / 2
        np.add.at(confusion, (outputs[half::2], wanted[half::2]), 1)
        _, label_of = linear_sum_assignment(confusion, maximize=True)
        right[1 - half :: 2] = label_of[outputs[1 - half :: 2]] == wanted[1 - half :: 2]
    return right
