"""Comparison of two engines on the same held-out images: accuracy, agreement and logit shift."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpcompile.data.images import Split
from mpcompile.errors import ParityError

SIGNIFICANCE = 0.05  # level of the exact McNemar test on top-1
Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Top-1 and top-5 accuracy as shares in [0, 1], and the number of images."""

    top1: float
    top5: float | None  # None if the model has 5 outputs or fewer
    count: int


@dataclass(frozen=True, slots=True)
class ChangedAnswers:
    """The numbers of images whose top-1 answer became right or wrong, with the p-value of their difference.

    `chance` is the p-value of the exact McNemar test. Its null hypothesis is that each changed answer is as likely to
    become right as to become wrong, so the smaller number is binomial. The test is exact for any number of images.
    """

    right: int
    wrong: int
    chance: float

    @classmethod
    def between(cls, dense: NDArray[np.bool_], compressed: NDArray[np.bool_]) -> "ChangedAnswers":
        """The changes between two models. Both arrays (n,) say for each image, in one order, whether it is right."""
        right, wrong = int((compressed & ~dense).sum()), int((dense & ~compressed).sum())
        return cls(right, wrong, _p_value(right, wrong))

    def __str__(self) -> str:
        result = "significant" if self.chance < SIGNIFICANCE else "not significant"
        return (
            f"{self.right:,} answers became right and {self.wrong:,} wrong; this change is {result} "
            f"(p = {self.chance:.2g}, exact McNemar test)"
        )


def _p_value(one: int, other: int) -> float:
    """The two-sided p-value of the exact McNemar test; 1 if no answer changed."""
    from scipy.stats import binomtest

    return float(binomtest(min(one, other), one + other).pvalue) if one + other else 1.0


@dataclass(frozen=True, slots=True)
class Comparison:
    """A compressed model compared with the dense one on the same images.

    The logit shift of an image is the maximum over outputs of |logit − dense logit|. `logit_range` is the mean over
    images of the dense model's max − min logit, the scale to compare shifts with.
    """

    dense: Accuracy | None  # None if the images have no labels
    compressed: Accuracy | None
    agreement: float  # share of images with the same top-1 answer
    logit_shift_mean: float
    logit_shift_p99: float
    logit_shift_max: float
    logit_range: float
    count: int
    turned: ChangedAnswers | None = None  # top-1 answers that became right or wrong; None if the images have no labels


def compare(
    dense: Run, compressed: Run, images: Split, observe: Callable[[int], None] = lambda done: None
) -> Comparison:
    """The comparison of two engines over all images of a split, batch by batch.

    `dense` and `compressed` return logits (b, outputs) for images (b, c, h, w). `observe` is called with the number of
    images done. Raises ParityError if outputs are not finite.
    """
    pairs: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []
    labels: list[NDArray[np.int64]] = []
    for pixels, classes in images.batches():
        batch = pixels.numpy()
        pairs.append((dense(batch), compressed(batch)))
        labels.append(classes.numpy())
        observe(sum(map(len, labels)))
    before, after = (np.concatenate(side) for side in zip(*pairs, strict=True))
    for name, logits in (("dense", before), ("compressed", after)):
        if not np.isfinite(logits).all():
            raise ParityError(f"the {name} model returns numbers that are not finite on held-out images")
    truth = np.concatenate(labels)
    answers = before.argmax(1), after.argmax(1)
    shift = np.abs(after - before).reshape(len(before), -1).max(axis=1)
    return Comparison(
        dense=accuracy(before, truth) if images.labelled else None,
        compressed=accuracy(after, truth) if images.labelled else None,
        agreement=float((answers[0] == answers[1]).mean()),
        logit_shift_mean=float(shift.mean()),
        logit_shift_p99=float(np.percentile(shift, 99)),
        logit_shift_max=float(shift.max()),
        logit_range=float(np.ptp(before, axis=1).mean()),
        count=len(before),
        turned=ChangedAnswers.between(answers[0] == truth, answers[1] == truth) if images.labelled else None,
    )


def accuracy(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> Accuracy:
    """Top-1 and top-5 accuracy of logits (n, outputs) against labels (n,). In a tie the lower index ranks first."""
    order = np.argsort(-logits, axis=1, kind="stable")
    hits = order == labels[:, None]
    top5 = float(hits[:, :5].any(axis=1).mean()) if logits.shape[1] > 5 else None
    return Accuracy(float(hits[:, 0].mean()), top5, len(labels))
