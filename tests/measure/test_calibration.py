"""Calibration error by hand, agreement by quartile of the margin, and the comparison of both models' confidence."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from mpcompile.ir.head import Head
from mpcompile.measure import confidence
from mpcompile.measure.accuracy import accuracy
from mpcompile.measure.calibration import calibration, calibration_of
from mpcompile.measure.confidence_comparison import compare_confidence
from mpcompile.measure.margin_agreement import agreement_by_margin

LOGITS = npst.arrays(np.float32, (9, 4), elements=st.floats(-20, 20, width=32))


def test_the_calibration_error_by_hand() -> None:
    """Two bins: (0.6, 0.667] has two predictions, both right; (0.933, 1] one that is wrong."""
    found = calibration_of(torch.tensor([0.61, 0.65, 1.0]).double(), torch.tensor([1.0, 1.0, 0.0]).double())
    assert found.error == pytest.approx((2 * (1 - 0.63) + 1) / 3)
    assert [(row.count, row.right) for row in found.bins] == [(2, 1.0), (1, 0.0)]
    assert (found.bins[0].low, found.bins[0].high) == pytest.approx((9 / 15, 10 / 15))


def test_a_model_that_says_how_often_it_is_right_is_calibrated() -> None:
    rng = torch.Generator().manual_seed(0)
    outputs = 2 * torch.randn(20_000, 4, generator=rng)
    labels = outputs.softmax(1).multinomial(1, generator=rng)[:, 0]
    honest, boasting = calibration(outputs, labels), calibration(3 * outputs, labels)
    assert honest is not None
    assert boasting is not None
    assert honest.error < 0.012
    assert boasting.error > 0.1


@given(LOGITS, npst.arrays(np.int64, 9, elements=st.integers(0, 3)))
def test_bins_hold_every_prediction_once(outputs: np.ndarray, labels: np.ndarray) -> None:
    found = calibration(outputs, labels)
    assert found is not None
    assert sum(row.count for row in found.bins) == 9
    assert sum(row.count * row.right for row in found.bins) / 9 == pytest.approx(accuracy(outputs, labels).top1)
    assert all(row.low - 1e-9 <= row.confidence <= row.high + 1e-9 for row in found.bins)


def test_each_label_of_an_image_is_a_prediction() -> None:
    outputs = torch.tensor([[3.0, -3.0], [3.0, 3.0]])
    found = calibration(outputs, torch.tensor([[1, 0], [1, 0]]), Head("multilabel"))
    assert found is not None
    [row] = found.bins
    assert (row.count, row.right) == (4, 0.75)


def test_one_logit_is_judged_by_the_side_of_its_threshold() -> None:
    found = calibration(torch.tensor([[2.0], [-2.0]]), torch.tensor([1, 1]), Head("sigmoid"))
    assert found is not None
    assert found.error == pytest.approx(float(torch.tensor(2.0).sigmoid()) - 0.5)


def test_labels_do_not_judge_values_positions_or_ranks() -> None:
    labels = torch.zeros(3, dtype=torch.long)
    assert calibration(torch.zeros(3, 2), labels, Head("values")) is None
    assert calibration(torch.zeros(3, 2, 2), labels, Head()) is None
    assert calibration(torch.zeros(3, 2), labels, Head("ordinal")) is None


def test_decisions_that_were_close_change_first() -> None:
    rng = torch.Generator().manual_seed(0)
    dense = torch.randn(400, 5, generator=rng)
    found = agreement_by_margin(dense, dense + 0.4 * torch.randn(400, 5, generator=rng))
    assert found is not None
    assert [row.count for row in found] == [100] * 4
    assert found[0].agreement < 0.7
    assert found[3].agreement > 0.95
    assert found[0].highest <= found[1].lowest
    low, high = found[0].interval or (1.0, 0.0)
    assert low < found[0].agreement < high


@given(LOGITS, LOGITS)
def test_quartiles_hold_every_decision_once(one: np.ndarray, other: np.ndarray) -> None:
    found = agreement_by_margin(one, other)
    assert found is not None
    assert sorted(row.count for row in found) == [2, 2, 2, 3]
    assert sum(row.agreeing for row in found) == int(Head().same(one, other).sum())
    assert [row.lowest for row in found] == sorted(row.lowest for row in found)


def test_margins_are_those_of_the_head() -> None:
    found = agreement_by_margin(torch.tensor([[0.5], [-2.0]]), torch.tensor([[-0.5], [-2.0]]), Head("sigmoid"))
    assert found is not None
    assert [(row.lowest, row.agreeing) for row in found] == [(0.5, 0), (2.0, 1)]
    found = agreement_by_margin(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([[3.0, 1.0, 0.0]]))
    assert found is not None
    assert found[0].lowest == pytest.approx(2.0)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = torch.Generator().manual_seed(0)
    dense, compressed = torch.randn(30, 4, 2, generator=rng), torch.randn(30, 4, 2, generator=rng)
    whole = compare_confidence(dense, compressed, None, Head())
    monkeypatch.setattr(confidence, "CHUNK", 20)
    parts = compare_confidence(dense, compressed, None, Head())
    assert whole is not None
    assert parts is not None
    assert parts.quartiles == whole.quartiles
    assert parts.compressed.top_probability == pytest.approx(whole.compressed.top_probability, rel=1e-12)


def test_positions_have_quartiles_and_no_interval() -> None:
    outputs = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = agreement_by_margin(outputs, outputs, Head())
    assert found is not None
    assert [(row.count, row.agreeing, row.interval) for row in found] == [(8, 8, None)] * 4


def test_lost_confidence_is_told_from_lost_answers() -> None:
    rng = torch.Generator().manual_seed(0)
    dense = 3 * torch.randn(500, 5, generator=rng)
    labels = dense.softmax(1).multinomial(1, generator=rng)[:, 0]
    found = compare_confidence(dense.numpy(), dense.numpy() / 2, labels.numpy())
    assert found is not None
    assert found.best_factor == pytest.approx(2)
    assert found.least_divergence == pytest.approx(0, abs=1e-9)
    assert found.divergence > 0.05
    assert found.compressed.top_probability < found.dense.top_probability
    assert all(row.agreement == 1 for row in found.quartiles)
    assert found.dense.calibration is not None
    assert found.compressed.calibration is not None
    assert found.compressed.calibration.error > found.dense.calibration.error


def test_without_labels_there_is_no_calibration_error() -> None:
    outputs = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    found = compare_confidence(outputs, outputs)
    assert found is not None
    assert (found.dense.calibration, found.compressed.calibration, found.divergence) == (None, None, 0.0)
    assert compare_confidence(outputs, outputs, None, Head("values")) is None
