"""Products, factors and eigenvectors against NumPy's in float64, in both precisions, and the same bits in any batch."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.linalg import LinAlgError

from mpcompile.system.symmetric_matrices import cholesky, cholesky_solved, eigenvectors, factorize, gram

# Errors grow with the condition, which is below 100 here, and with the size; ten times what was seen in 1,000 draws.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-12}
both_precisions = st.sampled_from(list(TOLERANCE))


def positive(seed: int, count: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Symmetric matrices with eigenvalues between 0.1 and 10."""
    rng = np.random.default_rng(seed)
    rotations = np.linalg.qr(rng.standard_normal((count, size, size)))[0]
    values = rng.uniform(0.1, 10, (count, 1, size))
    return torch.from_numpy((rotations * values) @ rotations.swapaxes(1, 2)).to(dtype)


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), both_precisions)
def test_products(seed: int, count: int, rows: int, size: int, dtype: torch.dtype) -> None:
    x = torch.randn(count, rows, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    wanted = x.double().mT @ x.double()
    torch.testing.assert_close(gram(x).double(), wanted, rtol=0, atol=10 * TOLERANCE[dtype])
    assert torch.equal(gram(x), gram(x).mT)


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 40), both_precisions)
def test_factors_and_solutions(seed: int, count: int, size: int, dtype: torch.dtype) -> None:
    matrices = positive(seed, count, size, dtype)
    given_values = matrices.clone()
    factors = cholesky(matrices)
    assert torch.equal(matrices, given_values)  # the argument is not changed
    lower = factors.tril()
    expected = np.linalg.cholesky(matrices.double().numpy())
    np.testing.assert_allclose(lower.double().numpy(), expected, rtol=0, atol=10 * TOLERANCE[dtype])
    right = torch.randn(count, size, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    solution = cholesky_solved(factors, right).double().numpy()
    wanted = np.linalg.solve(matrices.double().numpy(), right.double().numpy())
    np.testing.assert_allclose(solution, wanted, rtol=0, atol=1000 * TOLERANCE[dtype])
    for one, of_batch in zip(matrices, lower, strict=True):
        assert torch.equal(cholesky(one[None])[0].tril(), of_batch)


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 40), both_precisions)
def test_eigenvectors(seed: int, count: int, size: int, dtype: torch.dtype) -> None:
    matrices = positive(seed, count, size, dtype)
    values, vectors = eigenvectors(matrices)
    expected = np.linalg.eigvalsh(matrices.double().numpy())
    np.testing.assert_allclose(values.double().numpy(), expected, rtol=0, atol=10 * TOLERANCE[dtype])
    again = (vectors * values[:, None]) @ vectors.mT
    torch.testing.assert_close(again, matrices, rtol=0, atol=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_one_matrix_that_is_not_positive_definite_is_told(dtype: torch.dtype) -> None:
    matrices = positive(0, 3, 8, dtype)
    matrices[1] -= 5 * torch.eye(8, dtype=dtype)
    assert not factorize(matrices.clone())
    with pytest.raises(LinAlgError, match="not positive definite"):
        cholesky(matrices)
