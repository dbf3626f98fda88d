"""Marchenko–Pastur: the law against quadrature, the fit to matrices of known σ, and errors of published code."""

from itertools import pairwise

import numpy as np
import pytest
import scipy.integrate
from hypothesis import given, settings
from hypothesis import strategies as st

from mpcompile.analysis.spectrum import (
    BINS_TO_EDGE,
    HISTOGRAM_BINS,
    NoFitError,
    analyse,
    density,
    distribution,
    eigenvalues,
    fit_spectrum,
    noise_edge,
    quantile,
    support,
    tracy_widom_distribution,
    tracy_widom_quantile,
)

SIGMA = 0.02
SHAPES = [(64, 64), (64, 1024), (1024, 64), (128, 512), (512, 512), (1024, 256)]


def gaussian(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape) * SIGMA


# ---- the law


@pytest.mark.parametrize("q", [1.0, 0.75, 0.3, 0.02])
@pytest.mark.parametrize("variance", [1.0, 0.07])
def test_distribution_is_the_integral_of_the_density(q: float, variance: float) -> None:
    low, high = support(q, variance)
    points = np.linspace(low, high, 12)[1:-1]

    def integrand(x: float) -> float:
        return float(density(np.array([x]), q, variance)[0])

    for x, found in zip(points, distribution(points, q, variance), strict=True):
        # At q = 1 the density is unbounded at 0; as a density of √x it is bounded.
        expected, _ = scipy.integrate.quad(
            lambda r: integrand(r * r) * 2 * r, low**0.5, x**0.5, epsabs=1e-13, limit=500
        )
        assert abs(found - expected) < 1e-9


@pytest.mark.parametrize("q", [1.0, 0.3])
def test_distribution_is_0_and_1_outside_the_support(q: float) -> None:
    """Published code returns 0 above the upper edge too, which turns a good fit into an error of 0.75."""
    low, high = support(q, 2.0)
    assert distribution(np.array([-1.0, low, high, high * 10]), q, 2.0).tolist() == [0, 0, 1, 1]
    assert density(np.array([low - 0.1, high + 0.1]), q, 2.0).tolist() == [0, 0]


@given(st.floats(0.01, 1), st.floats(1e-6, 1e6), st.floats(0.001, 0.999))
def test_quantile_is_the_inverse(q: float, variance: float, share: float) -> None:
    x = quantile(np.array([share]), q, variance)
    # The slope of F is steep at small q: 1e-9 of probability is far more than the last bit of x.
    assert abs(distribution(x, q, variance)[0] - share) < 1e-9


def test_tracy_widom_matches_published_tables() -> None:
    """Quantiles and mean of the law of order 1: Bejan 2005 (quantiles), Bornemann 2010 (moments)."""
    table = {0.05: -3.1804, 0.10: -2.7824, 0.5: -1.2686, 0.90: 0.4501, 0.95: 0.9793, 0.99: 2.0234, 0.999: 3.2722}
    for share, value in table.items():
        assert tracy_widom_quantile(share) == pytest.approx(value, abs=1e-4)  # the digits printed there
    s = np.linspace(-9, 7, 1601)
    values = np.array([tracy_widom_distribution(float(x)) for x in s[::8]])
    mean = s[::8][-1] - scipy.integrate.simpson(values, x=s[::8])
    assert mean == pytest.approx(-1.2065335745820, abs=1e-4)


def test_the_edge_has_the_exponent_four_thirds() -> None:
    """Published code writes (1 + √γ)**4/3, which is a third of the fourth power."""
    p, n = 300, 300
    scale = (noise_edge(p, n, level=0.05) - 4) / tracy_widom_quantile(0.95)
    assert scale == pytest.approx(2 ** (4 / 3) * n ** (-2 / 3), rel=1e-12)


# ---- the fit


@pytest.mark.parametrize("shape", SHAPES)
def test_sigma_of_noise(shape: tuple[int, int]) -> None:
    fits = [fit_spectrum(eigenvalues(gaussian(shape, seed)), max(shape)) for seed in range(20)]
    # Even the best estimate of σ from pn numbers has a relative error of 1/√(2pn), which is 1.1 % at 64 × 64. So the
    # mean of 20 draws must be within 1 %, and each draw only for larger matrices.
    assert abs(np.mean([fit.sigma for fit in fits]) / SIGMA - 1) < 0.01
    if shape[0] * shape[1] >= 2**16:
        assert max(abs(fit.sigma / SIGMA - 1) for fit in fits) < 0.01
    assert abs(np.mean([fit.sigma_median for fit in fits]) / SIGMA - 1) < 0.02
    # Eigenvalues are rigid: each is within about one spacing of its quantile.
    assert np.mean([fit.central_error for fit in fits]) < 3 / min(shape)


@pytest.mark.parametrize("shape", [(100, 400), (200, 200)])
def test_noise_exceeds_the_edge_with_probability_level(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    edge = noise_edge(min(shape), max(shape), level=0.05)
    passed = np.mean([eigenvalues(rng.standard_normal(shape))[-1] > edge for _ in range(600)])
    assert 0.03 <= passed <= 0.07  # 5 % nominal; 600 draws have a standard deviation of 0.9 points


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 12), st.sampled_from([(128, 512), (300, 150), (256, 256)]), st.integers(0, 1000))
def test_planted_spikes_are_counted(rank: int, shape: tuple[int, int], seed: int) -> None:
    """Each signal well above the threshold of Baik, Ben Arous and Péché, σ (pn)^¼, makes one spike."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((shape[0], max(rank, 1))))[0]
    right = np.linalg.qr(rng.standard_normal((shape[1], max(rank, 1))))[0]
    threshold = SIGMA * (shape[0] * shape[1]) ** 0.25
    strengths = threshold * np.linspace(3, 6, max(rank, 1)) * (rank > 0)
    signal = left * strengths @ right.T
    # At level 1e-6, noise alone makes a spike once in a million draws.
    fit = fit_spectrum(eigenvalues(gaussian(shape, seed) + signal), max(shape), level=1e-6)
    assert fit.spikes == rank
    assert (fit.spike_mass > 0) == (rank > 0)


def test_plotting_positions_are_centred() -> None:
    """With i/p instead of (k − ½)/p the fit of a spectrum at its own quantiles would be biased."""
    p, n = 64, 128
    values = quantile((np.arange(p) + 0.5) / p, p / n, 4.0)
    fit = fit_spectrum(values, n)
    assert fit.sigma == pytest.approx(2.0, rel=1e-12)
    assert fit.full_error == pytest.approx(0.5 / p, rel=1e-6)


@pytest.mark.parametrize("factor", [1e-3, 7.0])
def test_sigma_and_edges_scale_with_the_weight(factor: float) -> None:
    weight = gaussian((96, 200))
    one, other = analyse(weight).fit, analyse(weight * factor).fit
    for name in ("sigma", "sigma_median", "edge", "bulk_edge"):
        assert getattr(other, name) == pytest.approx(factor * getattr(one, name), rel=1e-9)
    assert (other.spikes, other.bulk_share) == (one.spikes, one.bulk_share)
    assert other.central_error == pytest.approx(one.central_error, rel=1e-6)


def test_orientation_and_order_of_channels_do_not_matter() -> None:
    weight = gaussian((96, 200)) * np.linspace(0.5, 2, 200)
    rng = np.random.default_rng(1)
    mixed = weight[rng.permutation(96)][:, rng.permutation(200)]
    expected = analyse(weight).fit
    for other in (mixed, weight.T):
        found = analyse(other).fit
        # float64 sums in another order, through an eigenvalue solver.
        assert found.sigma == pytest.approx(expected.sigma, rel=1e-10)
        assert (found.p, found.n, found.spikes) == (expected.p, expected.n, expected.spikes)


def test_convolutions_are_unfolded() -> None:
    weight = np.random.default_rng(0).standard_normal((128, 16, 3, 3))
    assert analyse(weight).fit == analyse(weight.reshape(128, 144)).fit
    assert (analyse(weight).fit.p, analyse(weight).fit.n) == (128, 144)


def test_structure_fits_worse_than_the_null_model() -> None:
    """Unequal channels are structure, which shuffling removes."""
    weight = gaussian((128, 256)) * np.linspace(0.2, 2, 128)[:, None]
    found = analyse(weight)
    assert found.null is not None
    assert found.fit.central_error > 5 * found.null.central_error
    assert found.null.spikes <= 2
    assert found.null.sigma == pytest.approx(weight.std(), rel=0.02)
    assert analyse(weight, null=False).null is None
    assert analyse(weight, seed=5).null == analyse(weight, seed=5).null != found.null


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (np.ones((1, 500)), "its smaller side is 1; under 64"),
        (np.ones((63, 64)), "its smaller side is 63"),
        (np.zeros((64, 64)), "all its weights are zero"),
        (np.ones((64, 80)), "more than half of its singular values are zero"),
        (np.where(np.arange(64 * 64).reshape(64, 64) == 7, np.nan, 1.0), "1 of its weights are not finite"),
        (np.random.default_rng(0).standard_cauchy((128, 512)), "heavy-tailed"),
        (np.random.default_rng(0).standard_t(3, (768, 768)), "heavy-tailed"),
    ],
)
def test_unfit_matrices_are_refused_with_a_reason(weight: np.ndarray, reason: str) -> None:
    with pytest.raises(NoFitError, match=reason):
        analyse(weight)


@pytest.mark.parametrize("name", ["laplace", "uniform"])
def test_light_tailed_entries_follow_the_law(name: str) -> None:
    weight = getattr(np.random.default_rng(0), name)(-1 if name == "uniform" else 0, 1, (256, 512))
    found = analyse(weight)
    assert found.fit.sigma == pytest.approx(weight.std(), rel=0.01)
    assert found.fit.spikes <= 1


@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (128, 128)])
def test_the_histogram_counts_singular_values(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    left, right = (side / np.linalg.norm(side) for side in (rng.standard_normal(n) for n in shape))
    weight = gaussian(shape) + 8 * SIGMA * max(shape) ** 0.5 * np.outer(left, right)  # a spike beyond the last bin
    summary = analyse(weight, null=False).summary
    singular = np.linalg.svd(weight, compute_uv=False)
    ends = np.arange(HISTOGRAM_BINS + 1) * summary.edge / BINS_TO_EDGE
    expected = [int(((singular >= low) & (singular < high)).sum()) for low, high in pairwise(ends)]
    assert list(summary.histogram) == expected
    assert sum(summary.histogram) == min(shape) - 1
    assert sum(summary.histogram[BINS_TO_EDGE:]) + 1 == summary.spikes
