"""Confidence: the divergence is the textbook's, the common factor is its minimum and keeps every decision."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from mpcompile.ir.head import Head
from mpcompile.measure import confidence
from mpcompile.measure.confidence import (
    LARGEST_FACTOR,
    SMALLEST_FACTOR,
    common_factor,
    divergence,
    divergences,
    mean_top_probability,
    top_probabilities,
)

LOGITS = npst.arrays(np.float32, (7, 4), elements=st.floats(-20, 20, width=32))
HEADS = (Head(), Head("sigmoid", 0.7), Head("multilabel"), Head("multilabel", -0.4), Head("ordinal"))


def logits(seed: int, *shape: int) -> torch.Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def of_head(head: Head, outputs: torch.Tensor) -> torch.Tensor:
    return outputs[:, :1] if head.kind == "sigmoid" else outputs


def scaled(outputs: torch.Tensor, head: Head, factor: float) -> torch.Tensor:
    t = 0.0 if head.kind == "softmax" else head.threshold
    return t + factor * (outputs.double() - t)


def test_the_divergence_of_classes_by_hand() -> None:
    dense, compressed = logits(0, 5, 3), logits(1, 5, 3)
    p, q = dense.double().softmax(1), compressed.double().softmax(1)
    torch.testing.assert_close(divergences(dense, compressed), (p * (p / q).log()).sum(1))


def test_the_divergence_of_thresholds_is_the_sum_over_outputs() -> None:
    dense, compressed = logits(0, 5, 3), logits(1, 5, 3)
    p, q = dense.double().sigmoid(), compressed.double().sigmoid()
    wanted = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1)
    for head in (Head("multilabel", 0.3), Head("ordinal")):
        torch.testing.assert_close(divergences(dense, compressed, head), wanted)
    torch.testing.assert_close(
        divergences(p.float(), q.float(), Head("multilabel", 0.5, True)), wanted, rtol=1e-4, atol=1e-4
    )


def test_probabilities_are_converted_to_logits() -> None:
    dense, compressed = logits(0, 5, 3), logits(1, 5, 3)
    p, q = dense.double().softmax(1), compressed.double().softmax(1)
    wanted, found = common_factor(dense, compressed), common_factor(p, q, Head(probabilities=True))
    assert wanted is not None
    assert found is not None
    assert found.factor == pytest.approx(wanted.factor, rel=1e-6)
    assert divergence(p, q, Head(probabilities=True)) == pytest.approx(divergence(dense, compressed))


def test_one_class_of_sigmoids_has_the_sigmoid_as_its_probability() -> None:
    outputs = torch.tensor([[0.9, 0.8, 0.1], [0.2, 0.3, 0.1]])
    found = top_probabilities(outputs, Head(probabilities=True))
    torch.testing.assert_close(found, torch.tensor([0.9, 0.3]).double())


def test_positions_are_averaged_in_each_image() -> None:
    dense, compressed = logits(0, 6, 3, 2, 2), logits(1, 6, 3, 2, 2)
    rows = [side.movedim(1, -1).reshape(-1, 3) for side in (dense, compressed)]
    each = divergences(rows[0], rows[1])
    assert each is not None
    torch.testing.assert_close(divergences(dense, compressed, Head()), each.view(6, 4).mean(1))
    assert mean_top_probability(dense, Head()) == pytest.approx(mean_top_probability(rows[0]))
    one, other = common_factor(dense, compressed, Head()), common_factor(rows[0], rows[1])
    assert one is not None
    assert other is not None
    assert one.factor == pytest.approx(other.factor, rel=1e-6)


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_the_factor_is_the_one_that_was_taken_away(head: Head) -> None:
    dense = of_head(head, logits(0, 50, 4))
    for factor in (0.2, 1.0, 1.7, 9.0):
        found = common_factor(dense, scaled(dense, head, 1 / factor), head)
        assert found is not None
        assert found.factor == pytest.approx(factor, rel=1e-6)
        assert found.divergence == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("head", HEADS, ids=str)
@given(one=LOGITS, other=LOGITS)
def test_no_factor_is_better(head: Head, one: np.ndarray, other: np.ndarray) -> None:
    dense, compressed = (of_head(head, torch.from_numpy(side)) for side in (one, other))
    found = common_factor(dense, compressed, head)
    assert found is not None
    assert SMALLEST_FACTOR <= found.factor <= LARGEST_FACTOR
    for factor in (SMALLEST_FACTOR, 0.5, 1.0, 2.0, LARGEST_FACTOR, found.factor * 1.01, found.factor * 0.99):
        if SMALLEST_FACTOR <= factor <= LARGEST_FACTOR:
            at = divergence(dense, compressed, head, factor)
            assert at is not None
            assert found.divergence <= at * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize("head", HEADS, ids=str)
@given(one=LOGITS, other=LOGITS)
def test_the_factor_keeps_every_decision(head: Head, one: np.ndarray, other: np.ndarray) -> None:
    dense, compressed = (of_head(head, torch.from_numpy(side)).double() for side in (one, other))
    found = common_factor(dense, compressed, head)
    assert found is not None
    after = scaled(compressed, head, found.factor)
    # Two outputs that differ by less than rounding can become equal, never change places.
    if head.kind == "softmax":
        largest = after.gather(1, compressed.argmax(1, keepdim=True))
        assert bool((largest == after.amax(1, keepdim=True)).all())
    else:
        above, now = compressed > head.threshold, after > head.threshold
        assert bool((above == now)[(compressed - head.threshold).abs() > 1e-12].all())


def test_equal_outputs_have_the_factor_one() -> None:
    dense = logits(0, 9, 4)
    found = common_factor(dense, dense.clone())
    assert found is not None
    assert (found.factor, found.divergence) == (1.0, 0.0)


def test_constant_outputs_leave_the_factor_at_one() -> None:
    found = common_factor(logits(0, 9, 4), torch.zeros(9, 4))
    assert found is not None
    assert (found.factor, found.standard_error) == (1.0, float("inf"))


def test_the_standard_error_is_the_spread_of_fits_on_other_images() -> None:
    def draw(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        dense = logits(seed, 400, 5)
        return dense, 0.6 * dense + logits(seed + 10_000, 400, 5) / 3

    fits = [common_factor(*draw(seed)) for seed in range(60)]
    factors = torch.tensor([fit.factor for fit in fits if fit is not None])
    errors = torch.tensor([fit.standard_error for fit in fits if fit is not None])
    assert float(errors.mean() / factors.std()) == pytest.approx(1, abs=0.3)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, compressed = logits(0, 50, 4), logits(1, 50, 4)
    whole = common_factor(dense, compressed)
    monkeypatch.setattr(confidence, "CHUNK", 12)
    parts = common_factor(dense.numpy(), compressed.numpy())
    assert whole is not None
    assert parts is not None
    assert parts.factor == pytest.approx(whole.factor, rel=1e-9)
    assert parts.standard_error == pytest.approx(whole.standard_error, rel=1e-9)


def test_large_logits_stay_finite() -> None:
    found = common_factor(torch.tensor([[3e4, -3e4], [0.0, 1e4]]), torch.tensor([[-3e4, 3e4], [5.0, -1e4]]))
    assert found is not None
    assert np.isfinite(found.divergence)
    ones = torch.tensor([[1.0], [0.0]])
    assert np.isfinite(divergence(ones, 1 - ones, Head("sigmoid", 0.5, True)) or np.nan)


def test_probabilities_of_decisions_by_hand() -> None:
    outputs = torch.tensor([[2.0], [-1.0]])
    sides = torch.tensor([2.0, 1.0]).double().sigmoid()
    torch.testing.assert_close(top_probabilities(outputs, Head("sigmoid")), sides)
    # Above the threshold, the decision is yes, whatever its probability.
    sides = torch.tensor([2.0, -1.0]).double().sigmoid()
    torch.testing.assert_close(top_probabilities(outputs, Head("sigmoid", -2.0)), sides)
    assert mean_top_probability(torch.zeros(3, 4)) == pytest.approx(0.25)


def test_values_have_no_confidence() -> None:
    outputs = logits(0, 3, 4)
    for found in (
        common_factor(outputs, outputs, Head("values")),
        divergence(outputs, outputs, Head("values")),
        mean_top_probability(outputs, Head("values")),
    ):
        assert found is None
