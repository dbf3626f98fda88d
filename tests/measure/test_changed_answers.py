"""The changed answers of two models: the interval of their change, and when one of them `is_better`."""

import numpy as np
import pytest

from mpcompile.measure.changed_answers import ChangedAnswers, is_better
from mpcompile.measure.intervals import paired_interval


def right(count: int, of: int = 200) -> np.ndarray:
    return np.arange(of) < count


def test_better_needs_significance() -> None:
    assert is_better(right(100), right(130), 1e-5)
    assert not is_better(right(100), right(104), 1e-5)
    assert not is_better(right(100), right(130), 1e-10)


def test_better_needs_the_gain() -> None:
    assert is_better(right(100), right(130), 1e-5, 0.15)
    assert not is_better(right(100), right(130), 1e-5, 0.16)


def test_worse_is_not_better_however_significant() -> None:
    assert not is_better(right(130), right(100), 1e-5)
    assert not is_better(right(100), right(100), 1.0)


def test_the_paired_interval_turns_with_its_arguments_and_narrows_with_correlation() -> None:
    low, high = paired_interval(20, 12, 2, 16)
    assert paired_interval(20, 2, 12, 16) == pytest.approx((-high, -low))
    assert 0 < low < 10 / 50 < high  # McNemar: p = 0.013
    # As many right answers in each model, but independent of each other: a wider interval around the same change.
    independent = paired_interval(14, 18, 8, 10)
    assert independent[0] < low
    assert independent[1] > high


def test_the_interval_covers_the_change_in_95_of_100_draws() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        both, gained, lost, neither = rng.multinomial(300, (0.8, 0.04, 0.06, 0.1))
        low, high = paired_interval(int(both), int(gained), int(lost), int(neither))
        inside += low <= -0.02 <= high
    assert 0.92 < inside / 400 < 0.98


def test_changes_carry_their_interval() -> None:
    dense, compressed = right(100), right(104)
    found = ChangedAnswers.between(dense, compressed)
    assert found.interval == paired_interval(100, 4, 0, 96)
    assert found.interval[0] < 0.02 < found.interval[1]
    assert ChangedAnswers.between(dense, dense).interval == pytest.approx((0, 0), abs=0.02)
    assert ChangedAnswers.between(right(0, of=0), right(0, of=0)).interval is None
