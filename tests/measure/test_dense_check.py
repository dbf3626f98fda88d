"""The check of the dense model: mistakes by construction are noticed, right models raise no alarm."""

from typing import Any

import numpy as np
import pytest

from mpcompile.ir.head import Head
from mpcompile.measure.dense_check import DenseCheck, check_dense


def classifier(count: int, classes: int, accuracy: float, seed: int = 0) -> tuple[Any, Any]:
    """Confident logits (count, classes) that are right at this rate, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    answers = np.where(rng.random(count) < accuracy, labels, rng.integers(0, classes, count))
    logits = rng.standard_normal((count, classes)) + 8 * np.eye(classes)[answers]
    return logits.astype(np.float32), labels


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    ("count", "classes", "accuracy"), [(60, 10, 0.9), (400, 10, 0.75), (300, 100, 0.7), (100, 2, 0.8)]
)
def test_right_models_raise_no_alarm(seed: int, count: int, classes: int, accuracy: float) -> None:
    logits, labels = classifier(count, classes, accuracy, seed)
    found = check_dense(logits, labels, Head(), claimed=accuracy)
    assert found.reasons == found.remarks == ()
    assert found.confidence is not None
    assert found.confidence > accuracy - 0.05


@pytest.mark.parametrize("seed", range(10))
def test_permuted_and_shifted_labels_are_noticed(seed: int) -> None:
    logits, labels = classifier(400, 10, 0.88, seed)
    orders = (np.random.default_rng(seed).permutation(10), (np.arange(10) + 1 + seed % 9) % 10)
    for order in orders:
        if (order == np.arange(10)).all():
            continue
        found = check_dense(logits, order[labels], Head())
        [reason] = found.reasons
        assert "the order of the labels is wrong" in reason
        assert found.reordered == pytest.approx(check_dense(logits, labels, Head()).reordered)


def test_two_swapped_labels_of_ten_are_noticed() -> None:
    logits, labels = classifier(400, 10, 0.88)
    swapped = np.array([1, 0, *range(2, 10)])
    assert "the order of the labels is wrong" in check_dense(logits, swapped[labels], Head()).reasons[0]


def test_a_confident_model_at_chance_cannot_be_right() -> None:
    logits, labels = classifier(400, 10, 0.0)
    [reason] = check_dense(logits, labels, Head()).reasons
    assert "no more than by chance" in reason
    assert "mean, deviation, size, interpolation, crop, channel order" in reason


def test_a_model_that_is_not_confident_has_no_accuracy_to_lose_at_chance() -> None:
    logits, labels = classifier(400, 10, 0.0)
    [reason] = check_dense(logits / 100, labels, Head()).reasons
    assert "no more than by chance" in reason
    assert "it has no accuracy to lose. Check whether the file has trained weights" in reason
    # With few images an accuracy well above chance is still possible: that is remarked, and contradicts nothing.
    found = check_dense(logits[:40] / 100, labels[:40], Head())
    assert found.reasons == ()
    assert "not above chance" in found.remarks[0]
    # The same decision for all images of a large class is not above chance either, and may be the best one.
    alike: Any = (
        np.tile([[0.1, 0.0]], (200, 1)).astype(np.float32) + np.linspace(0, 0.01, 200, dtype=np.float32)[:, None]
    )
    assert check_dense(alike, np.repeat([0, 1], [190, 10]), Head()).reasons == ()


def test_a_model_far_less_often_right_than_its_confidence_says_cannot_be_right() -> None:
    logits, labels = classifier(400, 10, 0.4)
    [reason] = check_dense(logits, labels, Head()).reasons
    assert "with a mean confidence of 9" in reason
    assert "by chance" not in reason


def test_an_accuracy_far_below_the_claim_is_noticed() -> None:
    logits, labels = classifier(400, 10, 0.75)
    [reason] = check_dense(logits, labels, Head(), claimed=0.98).reasons
    assert "its checkpoint records 98.00%" in reason
    assert check_dense(logits, labels, Head(), claimed=0.8).reasons == ()


def test_swapped_labels_of_one_logit_are_noticed() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    logits: Any = ((labels * 2 - 1) * 3 + rng.standard_normal(200)).astype(np.float32)[:, None]
    assert check_dense(logits, labels, Head("sigmoid")).reasons == ()
    assert "the order of the labels is wrong" in check_dense(logits, 1 - labels, Head("sigmoid")).reasons[0]
    probabilities = 1 / (1 + np.exp(-logits))
    assert check_dense(probabilities, labels, Head("sigmoid", 0.5, True)).confidence == pytest.approx(
        check_dense(logits, labels, Head("sigmoid")).confidence, rel=1e-5
    )


def test_constant_outputs_are_noticed_without_labels() -> None:
    outputs: Any = np.zeros((20, 10), np.float32)
    for values in (outputs, outputs + 3):
        found = check_dense(values, None, Head())
        assert "returns the same outputs for all 20 held-out images" in found.reasons[0]
    varied: Any = np.linspace(1, 2, 20, dtype=np.float32)[:, None] * np.arange(10, dtype=np.float32)
    found = check_dense(varied, None, Head())
    assert found == DenseCheck(None, None, None, 1.0, None, (), found.remarks)
    assert "gives the same decision, 9, for all 20 held-out images" in found.remarks[0]


def test_few_images_tell_nothing() -> None:
    logits, labels = classifier(7, 10, 1.0)
    assert check_dense(logits, (labels + 1) % 10, Head()).reasons == ()
