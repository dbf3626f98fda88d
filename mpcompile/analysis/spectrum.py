"""Marchenko–Pastur on arrays: density, distribution, fit of σ, edge, and how well the law fits.

One convention throughout. A weight is a matrix of p × n entries, p ≤ n, turned if need be; q = p/n ≤ 1. Its spectrum
is that of the p × p matrix W Wᵀ / n. If the entries are independent with mean 0 and variance σ², then, as p and n
grow, the eigenvalues follow the Marchenko–Pastur law with density

    f(x) = √((λ₊ − x)(x − λ₋)) / (2π σ² q x)   on [λ₋, λ₊],   λ± = σ² (1 ± √q)².

Trained layers are this bulk plus some eigenvalues above it ("spikes") that carry structure.

- σ² is fitted to the middle of the spectrum, which spikes do not reach: least squares of eigenvalues on quantiles of
  the law, through the origin (BEMA: Ke, Ma and Lin, arXiv 2006.00436), with the plotting positions (k − ½)/p.
- The largest eigenvalue of pure noise exceeds λ₊ by a Tracy–Widom fluctuation (Johnstone 2001). The edge

      T₊ = σ² [(1 + √q)² + t n^(−2/3) q^(−1/6) (1 + √q)^(4/3)]

  is passed by noise with probability `level`, where t is the (1 − level) quantile of the Tracy–Widom law of order 1.
- As a singular value of W the bulk ends at σ₊ = √(n λ₊) = σ (√n + √p).
- The same fit on the layer's own entries, shuffled, is the null: what a layer of just these numbers without any
  arrangement would show.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from mpcompile.ir.results import Spectrum

CENTRE = 0.25  # the share of eigenvalues left out of the fit at either end
HEAVY_ENTRIES = 3  # one or two outliers are known of trained layers, and leave one or two spikes
HEAVY_SHARE = 0.25  # of the spikes that single entries may account for, where there are so many entries
TAIL = 20  # how many of the largest eigenvalues tell the exponent of the tail
SMALLEST_SIDE = 64  # below this the law is off by more than a hundredth by finite size alone


@dataclass(frozen=True, slots=True)
class Fit:
    """A Marchenko–Pastur law fitted to a spectrum, and how far the spectrum is from it.

    `edge` and `bulk_edge` are singular values of the weight: T₊ with its Tracy–Widom correction, and σ₊ without.
    `spikes` counts eigenvalues above T₊, `spike_mass` is their share of the sum of squares of the weight, and
    `bulk_share` the share of eigenvalues inside [λ₋, λ₊]. `tail_exponent` is Hill's estimate from the TAIL largest
    eigenvalues, 1 + 1 / mean(log λᵢ − log λ_TAIL), infinite where they are all equal. The errors are largest distances
    between the empirical and the fitted distribution function: over the middle half of the spectrum, and over all of
    it.
    """

    p: int
    n: int
    sigma: float
    sigma_median: float  # Gavish and Donoho's estimate, from the median alone
    edge: float
    bulk_edge: float
    spikes: int
    spike_mass: float
    bulk_share: float
    tail_exponent: float
    central_error: float
    full_error: float

    @property
    def q(self) -> float:
        """The aspect ratio p/n, at most 1."""
        return self.p / self.n


# ---- the law


def support(q: float, variance: float = 1.0) -> tuple[float, float]:
    """λ₋ and λ₊."""
    return variance * (1 - q**0.5) ** 2, variance * (1 + q**0.5) ** 2


def density(x: Float[ndarray, "*n"], q: float, variance: float = 1.0) -> Float[ndarray, "*n"]:
    """The density f at x; 0 outside the support."""
    low, high = support(q, variance)
    inside = np.clip((high - x) * (x - low), 0, None)
    return np.sqrt(inside) / (2 * np.pi * variance * q * np.where(inside > 0, x, 1.0))


def distribution(x: Float[ndarray, "*n"], q: float, variance: float = 1.0) -> Float[ndarray, "*n"]:
    """F at x, in closed form; exactly 0 below the support and exactly 1 above it."""
    low, high = support(q, variance)
    y = np.clip(x, low, high)
    root = np.sqrt(np.clip((high - y) * (y - low), 0, None))
    first = np.arcsin(np.clip((2 * y - low - high) / (high - low), -1, 1))
    # At q = 1 the support begins at 0, and the term has no weight there.
    ratio = ((low + high) * y - 2 * low * high) / np.where(y > 0, y, 1.0) / (high - low)
    second = np.arcsin(np.clip(ratio, -1, 1))
    value = 0.5 + (root / variance + (1 + q) * first - (1 - q) * second) / (2 * np.pi * q)
    return np.where(x <= low, 0.0, np.where(x >= high, 1.0, np.clip(value, 0, 1)))


def quantile(share: Float[ndarray, "*n"], q: float, variance: float = 1.0) -> Float[ndarray, "*n"]:
    """The inverse of `distribution`, by bisection to the last bit that matters (60 halvings of the support)."""
    ends = support(q, variance)
    low, high = np.full(share.shape, ends[0]), np.full(share.shape, ends[1])
    for _ in range(60):
        middle = (low + high) / 2
        below = distribution(middle, q, variance) < share
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.asarray((low + high) / 2)


# ---- the edge


def tracy_widom_distribution(s: float, nodes: int = 60) -> float:
    """F₁(s), as the Fredholm determinant det(I − ½ Ai((x + y)/2)) on (s, ∞) (Ferrari and Spohn 2005).

    Gauss–Legendre in Bornemann's manner; the Airy function is below 1e-17 beyond 16.
    """
    import scipy.special

    points, weights = np.polynomial.legendre.leggauss(nodes)
    end = max(16.0, s + 16.0)
    x = (end - s) / 2 * points + (end + s) / 2
    root = np.sqrt((end - s) / 2 * weights)
    kernel = scipy.special.airy((x[:, None] + x[None, :]) / 2)[0] / 2
    return float(np.linalg.det(np.eye(nodes) - root[:, None] * kernel * root[None, :]))


@lru_cache(maxsize=32)
def tracy_widom_quantile(share: float) -> float:
    """The t with F₁(t) = share."""
    import scipy.optimize

    return float(scipy.optimize.brentq(lambda s: tracy_widom_distribution(s) - share, -8.0, 8.0, xtol=1e-10))


def noise_edge(p: int, n: int, variance: float = 1.0, level: float = 0.05) -> float:
    """T₊: the eigenvalue that the largest of pure noise exceeds with probability `level`."""
    q = p / n
    t = tracy_widom_quantile(1 - level)
    return float(variance * ((1 + q**0.5) ** 2 + t * n ** (-2 / 3) * q ** (-1 / 6) * (1 + q**0.5) ** (4 / 3)))


# ---- the fit


def eigenvalues(weight: Float[ndarray, "rows columns"]) -> Float[ndarray, " p"]:
    """The spectrum of W Wᵀ / n in ascending order, p values, from the smaller Gram matrix in float64."""
    import scipy.linalg

    matrix = np.asarray(weight, np.float64)
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    gram = matrix @ matrix.T / matrix.shape[1]
    values = scipy.linalg.eigvalsh(gram, overwrite_a=True, check_finite=False)
    return np.asarray(np.clip(values, 0, None))


def fit_spectrum(values: Float[ndarray, " p"], n: int, level: float = 0.05) -> Fit:
    """The fit to eigenvalues of W Wᵀ / n in ascending order."""
    p = len(values)
    q = p / n
    share = (np.arange(p) + 0.5) / p
    centre = (share >= CENTRE) & (share <= 1 - CENTRE)
    expected = quantile(share[centre], q)
    variance = float(expected @ values[centre] / (expected @ expected))
    edge = noise_edge(p, n, variance, level)
    low, high = support(q, variance)
    above = values > edge
    # The empirical distribution steps at each value: the farther of its two sides counts.
    law = distribution(values, q, variance)
    tail = values[-TAIL:]
    spread = float(np.log(tail[1:] / tail[0]).mean()) if tail[0] > 0 else np.inf
    distance = np.maximum(np.abs(law - (share - 0.5 / p)), np.abs(law - (share + 0.5 / p)))
    return Fit(
        p=p,
        n=n,
        sigma=variance**0.5,
        sigma_median=float(np.sqrt(np.median(values) / quantile(np.array([0.5]), q)[0])),
        edge=float(np.sqrt(n * edge)),
        bulk_edge=float(np.sqrt(n * high)),
        spikes=int(above.sum()),
        spike_mass=float(values[above].sum() / values.sum()),
        bulk_share=float(((values >= low) & (values <= high)).mean()),
        tail_exponent=1 + 1 / spread if spread > 0 else np.inf,
        central_error=float(distance[centre].max()),
        full_error=float(distance.max()),
    )


# ---- layers


class NoFitError(ValueError):
    """A matrix to which the law cannot be fitted; the text says why, as a sentence for the report."""


@dataclass(frozen=True, slots=True)
class SpectrumFit:
    """The fit to a weight, and the same fit to its own entries shuffled (None where it was not asked for).

    `values` are the eigenvalues that were fitted, of W Wᵀ / n in ascending order; `null_values` those of the null.
    """

    fit: Fit
    null: Fit | None
    values: Float[ndarray, " p"] = field(repr=False, compare=False)
    null_values: Float[ndarray, " p"] | None = field(default=None, repr=False, compare=False)

    @property
    def summary(self) -> Spectrum:
        """What goes into the layer's plan."""
        return Spectrum(
            q=self.fit.q,
            sigma=self.fit.sigma,
            edge=self.fit.edge,
            spikes=self.fit.spikes,
            bulk_share=self.fit.bulk_share,
            fit_error=self.fit.central_error,
            null_error=None if self.null is None else self.null.central_error,
        )


def unfolded(weight: Float[ndarray, "out in_ *taps"]) -> Float[ndarray, "out inputs"]:
    """A Linear's weight as it is; a convolution's as out × (in_ · kh · kw)."""
    return weight.reshape(weight.shape[0], -1)


def analyse(
    weight: Float[ndarray, "out in_ *taps"], *, null: bool = True, level: float = 0.05, seed: int = 0
) -> SpectrumFit:
    """The fit to a layer's weight and to its null.

    Raises NoFitError for weights that are not finite, all zero or of vanishing rank, with a side under
    SMALLEST_SIDE, or with entries so heavy-tailed that single ones stand out of the bulk.
    """
    matrix = unfolded(np.asarray(weight, np.float64))
    p, n = sorted(matrix.shape)
    if p < SMALLEST_SIDE:
        raise NoFitError(f"its smaller side is {p}; under {SMALLEST_SIDE} the law is too coarse to be fitted")
    if not np.isfinite(matrix).all():
        raise NoFitError(f"{int((~np.isfinite(matrix)).sum())} of its weights are not finite")
    if not matrix.any():
        raise NoFitError("all its weights are zero")
    values = eigenvalues(matrix)
    # Rounding leaves eigenvalues of a low-rank matrix at 1e-16 of the largest, not at 0.
    if np.median(values) <= 1e-12 * values[-1]:
        raise NoFitError("more than half of its singular values are zero: it has no bulk")
    fit = fit_spectrum(values, n, level)
    # A single entry θ makes an eigenvalue of its own above the bulk from θ = σ (pn)^¼ on (Baik, Ben Arous and Péché).
    alone = int((np.abs(matrix) > fit.sigma * (p * n) ** 0.25).sum())
    if alone >= HEAVY_ENTRIES and alone > HEAVY_SHARE * fit.spikes:
        raise NoFitError(
            f"its entries are heavy-tailed: {alone} of them are each large enough to make a spike of their own (it has "
            f"{fit.spikes}), so that a spike need not be structure"
        )
    if not null:
        return SpectrumFit(fit, None, values)
    shuffled = eigenvalues(np.random.default_rng(seed).permuted(matrix.ravel()).reshape(matrix.shape))
    return SpectrumFit(fit, fit_spectrum(shuffled, n, level), values, shuffled)
