"""Which images are right after the labels are changed in a way that explains the decisions better.

Two ways are tried. Both are chosen on one half of the images, the even or the odd positions, and counted on the other
half, so that they do not fit their own images:

- **Matching.** Outputs are matched to labels one to one, by the assignment that maximises the confusion matrix. It
  needs several images of each class.
- **Shift.** The labels from some class on, or up to it, are moved by a number: a folder too many or too few moves the
  indices of all folders after it. One image of each class is enough.
"""

import numpy as np
from numpy.typing import NDArray

MOST_CLASSES = 2500  # of an assignment problem, which takes seconds at this size
MOST_SHIFTS = 5  # shifts that are tried: the most frequent differences between decision and label


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


def shifted_right(decided: NDArray[np.int64], labels: NDArray[np.int64]) -> tuple[str | None, NDArray[np.bool_]]:
    """Whether each decision is right after some labels are shifted, and the shift in words; None if none helps."""
    right = decided == labels
    found = [_best_shift(decided[half::2], labels[half::2]) for half in (0, 1)]
    for half, shift in enumerate(found):
        if shift is not None:
            others = slice(1 - half, None, 2)
            right[others] = _shifted(labels[others], *shift) == decided[others]
    text = next((_in_words(*shift) for shift in found if shift is not None), None)
    return text, right


def _best_shift(decided: NDArray[np.int64], labels: NDArray[np.int64]) -> tuple[int, int, int] | None:
    """The shift, and the first and the last label that it moves, that makes the most images right; None if none helps.

    All labels from some class on are moved, or all up to some class.
    """
    order = np.argsort(labels, kind="stable")
    decided, labels = decided[order], labels[order]
    values, counts = np.unique((decided - labels)[decided != labels], return_counts=True)
    right = decided == labels
    least, most = (int(labels[0]), int(labels[-1])) if len(labels) else (0, 0)
    best, gain = None, 0
    for shift in values[np.argsort(-counts, kind="stable")][:MOST_SHIFTS].tolist():
        gains = np.concatenate(
            [[0], np.cumsum((decided == labels + shift) * 1 - right)]
        )  # of moving the first n images
        starts = np.searchsorted(labels, labels)  # a class is moved as a whole
        ends = np.searchsorted(labels, labels, side="right")
        up_to, onwards = gains[ends], gains[-1] - gains[starts]
        for moved, span in (
            (up_to, (least, int(labels[up_to.argmax()]))),
            (onwards, (int(labels[onwards.argmax()]), most)),
        ):
            if moved.max() > gain:
                best, gain = (shift, *span), int(moved.max())
    return best


def _shifted(labels: NDArray[np.int64], shift: int, first: int, last: int) -> NDArray[np.int64]:
    """The labels, those from `first` to `last` moved by `shift`."""
    return np.where((labels >= first) & (labels <= last), labels + shift, labels)


def _in_words(shift: int, first: int, last: int) -> str:
    return f"the labels {first} to {last} are moved by {shift:+d}"
