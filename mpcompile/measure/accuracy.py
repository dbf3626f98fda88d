"""Two engines on the same held-out images: accuracy of each, agreement, and how far the logits moved."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpcompile.data.images import Split
from mpcompile.errors import ParityError

SIGNIFICANCE = 0.05  # a difference in top-1 that chance makes less often is called one
Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Shares of images in [0, 1], with the count that they rest on."""

    top1: float
    top5: float | None  # None where there are five outputs or fewer
    count: int


@dataclass(frozen=True, slots=True)
class Turned:
    """How many answers became right, how many wrong, and how often chance alone turns as unequal numbers.

    `chance` is the p-value of McNemar's test in its exact form: if an answer that turns may as well turn the other way,
    the smaller number is binomial. It holds for any number of images; both models answer the same ones.
    """

    right: int
    wrong: int
    chance: float

    @classmethod
    def between(cls, dense: NDArray[np.bool_], compressed: NDArray[np.bool_]) -> "Turned":
        """From which answers are right, in the same order."""
        right, wrong = int((compressed & ~dense).sum()), int((dense & ~compressed).sum())
        return cls(right, wrong, _chance(right, wrong))

    def __str__(self) -> str:
        counts = f"{self.right:,} answers put right and {self.wrong:,} put wrong"
        made = "seldom makes" if self.chance < SIGNIFICANCE else "can make"
        return f"{counts}, a difference that chance alone {made}: p = {self.chance:.2g} (exact McNemar test)"


def _chance(one: int, other: int) -> float:
    from scipy.stats import binomtest

    return float(binomtest(min(one, other), one + other).pvalue) if one + other else 1.0


@dataclass(frozen=True, slots=True)
class Comparison:
    """A model against the dense one on the same images.

    The logit shift of an image is max over outputs of |logit − dense logit|; `logit_range` is the mean over
    images of the dense model's max − min logit, which tells what a shift means.
    """

    dense: Accuracy | None  # None where the images have no labels
    compressed: Accuracy | None
    agreement: float
    logit_shift_mean: float
    logit_shift_p99: float
    logit_shift_max: float
    logit_range: float
    count: int
    turned: Turned | None = None  # as `dense`


def compare(
    dense: Run, compressed: Run, images: Split, observe: Callable[[int], None] = lambda done: None
) -> Comparison:
    """Both engines over every image of the split, batch by batch. Raises ParityError on outputs that are not finite."""
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
        turned=Turned.between(answers[0] == truth, answers[1] == truth) if images.labelled else None,
    )


def accuracy(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> Accuracy:
    """Top-1 and top-5 of logits (n, outputs); a tie counts for the lower index."""
    order = np.argsort(-logits, axis=1, kind="stable")
    hits = order == labels[:, None]
    top5 = float(hits[:, :5].any(axis=1).mean()) if logits.shape[1] > 5 else None
    return Accuracy(float(hits[:, 0].mean()), top5, len(labels))
