"""The images whose answer became right or wrong between two models or preprocessings, and the exact McNemar test."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpcompile.measure.intervals import paired_interval

SIGNIFICANCE = 0.05  # level of the exact McNemar test on top-1


@dataclass(frozen=True, slots=True)
class ChangedAnswers:
    """The numbers of images whose top-1 answer became right or wrong, with the p-value of their difference.

    `chance` is the p-value of the exact McNemar test. Its null hypothesis is that each changed answer is as likely to
    become right as to become wrong, so the smaller number is binomial. The test is exact for any number of images.
    `interval` is the 95 % confidence interval of the change of top-1 on images of the same distribution, as a share:
    of (right − wrong) / images, paired by image (Newcombe's hybrid score method). It is None in reports of earlier
    versions.
    """

    right: int
    wrong: int
    chance: float
    interval: tuple[float, float] | None = None

    @classmethod
    def between(cls, dense: NDArray[np.bool_], compressed: NDArray[np.bool_]) -> "ChangedAnswers":
        """The changes between two models. Both arrays (n,) say for each image, in one order, whether it is right."""
        right, wrong = int((compressed & ~dense).sum()), int((dense & ~compressed).sum())
        both, neither = int((compressed & dense).sum()), int((~compressed & ~dense).sum())
        interval = paired_interval(both, right, wrong, neither) if len(dense) else None
        return cls(right, wrong, _p_value(right, wrong), interval)

    @property
    def significant(self) -> bool:
        """Whether the change is significant by McNemar's test."""
        return self.chance < SIGNIFICANCE

    def __str__(self) -> str:
        result = "significant" if self.significant else "not significant"
        return (
            f"of the answers {self.right:,} became right and {self.wrong:,} wrong; this change is {result} "
            f"(p = {self.chance:.2g}, exact McNemar test)"
        )


def is_better(now: NDArray[np.bool_], other: NDArray[np.bool_], level: float, smallest_gain: float = 0.0) -> bool:
    """Whether significantly more answers are right in `other` than in `now`, both (n,), and by a share at least.

    `level` is that of the two-sided exact McNemar test; if the best of several is tried, the caller divides it by their
    number (Bonferroni).
    """
    changed = ChangedAnswers.between(now, other)
    gain = (changed.right - changed.wrong) / len(now)
    return gain > 0 and gain >= smallest_gain and changed.chance <= level


def _p_value(one: int, other: int) -> float:
    """The two-sided p-value of the exact McNemar test; 1 if no answer changed."""
    from scipy.stats import binomtest

    return float(binomtest(min(one, other), one + other).pvalue) if one + other else 1.0
