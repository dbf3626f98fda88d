"""Shifted labels are found with one image of each class, and right labels stay as they are."""

import numpy as np
import pytest

from mpcompile.ir.head import Head
from mpcompile.measure.dense_check import check_dense
from mpcompile.measure.label_order import shifted_right

CLASSES = 400


def decisions(seed: int, accuracy: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    """Decisions on one image of each class, right at this rate; wrong ones are often a neighbouring class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(CLASSES)
    near = (labels + rng.choice([-1, 1], CLASSES)) % CLASSES
    wrong = np.where(rng.random(CLASSES) < 0.5, near, rng.integers(0, CLASSES, CLASSES))
    return np.where(rng.random(CLASSES) < accuracy, labels, wrong), labels


def logits_of(decided: np.ndarray, confidence: float) -> np.ndarray:
    """Logits (n, CLASSES) that give each decision this probability."""
    logits = np.zeros((len(decided), CLASSES), np.float32)
    logits[np.arange(len(decided)), decided] = np.log(confidence / (1 - confidence) * (CLASSES - 1))
    return logits + np.random.default_rng(0).normal(0, 1e-3, logits.shape).astype(np.float32)


@pytest.mark.parametrize("seed", range(10))
def test_right_labels_stay(seed: int) -> None:
    decided, labels = decisions(seed)
    _, after = shifted_right(decided, labels)
    assert after.sum() <= (decided == labels).sum() + 4
    assert check_dense(logits_of(decided, 0.7), labels, Head()).reasons == ()


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("step", [-1, 1, 2])
def test_labels_moved_from_a_class_on_are_noticed(seed: int, step: int) -> None:
    decided, labels = decisions(seed)
    first = 40 + 30 * seed  # at least 90 of 400 classes are moved
    moved = np.where(labels >= first, labels + step, labels)
    text, after = shifted_right(decided, moved)
    assert after.mean() > 0.7
    assert text is not None
    assert f"moved by {-step:+d}" in text
    # The model has a low confidence, so that only the shift contradicts the accuracy.
    [reason] = check_dense(logits_of(decided, 0.4), moved, Head()).reasons
    assert f"{text}: the order of the labels is wrong" in reason


def test_labels_moved_up_to_a_class_are_noticed() -> None:
    decided, labels = decisions(0)
    text, after = shifted_right(decided, np.where(labels < 200, labels + 3, labels))
    assert after.mean() > 0.7
    assert text is not None
    assert "moved by -3" in text


def test_wrong_labels_of_confident_decisions_are_noticed() -> None:
    decided, labels = decisions(0)
    some = np.random.default_rng(0).permutation(CLASSES)[:160]
    mixed = labels.copy()
    mixed[some] = np.random.default_rng(1).permutation(labels[some])
    # Half of the decisions are very confident, the others hardly: the mean confidence does not exceed the accuracy.
    confidence = np.where(np.arange(CLASSES) % 2, 0.97, 0.3)
    logits = logits_of(decided, confidence)  # type: ignore[arg-type]
    logits[np.arange(CLASSES), labels] += 1  # right labels of wrong decisions rank second
    [reason] = check_dense(logits, mixed, Head()).reasons
    assert "of the 200 on which its confidence is above 90%" in reason
    assert check_dense(logits, labels, Head()).reasons == ()


@pytest.mark.parametrize("seed", range(5))
def test_a_few_permuted_classes_are_noticed_with_one_image_of_each(seed: int) -> None:
    decided, labels = decisions(seed, accuracy=0.9)
    some = np.random.default_rng(seed).permutation(CLASSES)[:70]
    mixed = labels.copy()
    mixed[some] = np.roll(labels[some], 1)
    # Right labels of wrong decisions rank second, as those of classes that look alike do.
    logits = logits_of(decided, 0.95)
    logits[np.arange(CLASSES), labels] += 1
    [reason] = check_dense(logits, mixed, Head()).reasons
    assert "rank behind 20 or more of its other classes: the labels of some classes are wrong" in reason
    assert check_dense(logits, labels, Head()).reasons == ()
