"""Relative error and cosine similarity of outputs that are values, against float64 numpy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from mpcompile.errors import ParityError
from mpcompile.ir.head import Head
from mpcompile.measure.accuracy import compare
from mpcompile.measure.value_errors import Norms, value_errors
from mpcompile.testing import tiny_data, tiny_mlp

MAPS = npst.arrays(np.float32, (5, 3, 2, 2), elements=st.floats(-100, 100, width=32))


@given(MAPS, MAPS, st.integers(1, 4))
def test_errors_against_float64(dense: NDArray[np.float32], found: NDArray[np.float32], cut: int) -> None:
    batches = [Norms.between(dense[:cut], found[:cut]), Norms.between(dense[cut:], found[cut:])]
    got = value_errors(batches)
    y, z = dense.astype(np.float64).reshape(5, -1), found.astype(np.float64).reshape(5, -1)
    norms = [np.sqrt((row**2).sum()) for row in y]
    errors, cosines = [], []
    for a, b, norm in zip(y, z, norms, strict=True):
        errors.append(np.sqrt(((b - a) ** 2).sum()) / (norm or np.mean(norms) or 1))
        length = norm * np.sqrt((b**2).sum())
        cosines.append((a * b).sum() / length if length else float(not a.any() and not b.any()))
    assert got.relative_error_mean == pytest.approx(np.mean(errors), rel=1e-9, abs=1e-12)
    assert got.relative_error_p99 == pytest.approx(np.percentile(errors, 99), rel=1e-9, abs=1e-12)
    assert got.relative_error_max == pytest.approx(max(errors), rel=1e-9, abs=1e-12)
    assert got.cosine_mean == pytest.approx(np.mean(cosines), rel=1e-9, abs=1e-9)
    assert got.cosine_min == pytest.approx(min(cosines), rel=1e-9, abs=1e-9)


@given(MAPS, st.floats(0.01, 50))
def test_a_scaled_output_has_the_same_direction(dense: NDArray[np.float32], by: float) -> None:
    got = value_errors([Norms.between(dense, dense.astype(np.float64) * (1 + by))])
    norms = np.linalg.norm(dense.reshape(5, -1).astype(np.float64), axis=1)
    assert got.cosine_min == pytest.approx(1, abs=1e-9)
    assert got.relative_error_max == pytest.approx(by if (norms > 0).any() else 0, rel=1e-6)


def test_a_comparison_of_values_has_no_agreement_and_no_accuracy() -> None:
    images = tiny_data(tiny_mlp()).held_out
    seen: list[int] = []

    def dense(x: NDArray[np.float32]) -> NDArray[np.float32]:
        return x

    found = compare(dense, lambda x: x * np.float32(1.1), images, seen.append)
    assert found.head == Head("values")
    assert (found.agreement, found.dense, found.compressed, found.turned, found.dense_check) == (None,) * 5
    assert found.values is not None
    assert found.values.relative_error_mean == pytest.approx(0.1, rel=1e-5)
    assert found.values.cosine_min == pytest.approx(1)
    assert found.count == seen[-1] == len(images)
    pixels = images.first(len(images)).numpy().reshape(len(images), -1)
    assert found.logit_range == pytest.approx(np.ptp(pixels, axis=1).mean(), rel=1e-6)
    assert found.logit_shift_max == pytest.approx(0.1 * np.abs(pixels).max(), rel=1e-4)
    with pytest.raises(ParityError, match="the compressed model returns numbers that are not finite"):
        compare(dense, lambda x: x * np.float32(np.inf), images)
    constant = compare(lambda x: x * 0 + 1, dense, images).dense_check
    assert constant is not None
    assert "the same outputs for all 64 held-out images" in constant.reasons[0]


def test_positions_of_a_map_agree_by_their_classes() -> None:
    images = tiny_data(tiny_mlp()).held_out

    def maps(x: NDArray[np.float32], flip: int = 0) -> NDArray[np.float32]:
        both = np.concatenate([x, -x], axis=1)
        both[:, :, :flip] *= -1
        return both

    found = compare(maps, lambda x: maps(x, 2), images, head=Head())
    assert found.positions == 64
    assert found.agreement == pytest.approx(6 / 8)
