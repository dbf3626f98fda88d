"""`is_better` needs a gain of the given size and significance."""

import numpy as np

from mpcompile.measure.changed_answers import is_better


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
