"""The Marchenko–Pastur law on arrays: density, distribution, fit of σ, edge, and goodness of fit.

One convention is used throughout. A weight is a p × n matrix W with p ≤ n, transposed if necessary; q = p/n ≤ 1. Its
spectrum is that of the p × p matrix W Wᵀ / n. If the entries are independent with mean 0 and variance σ², then, as p
and n grow, the eigenvalues follow the Marchenko–Pastur law with density

    f(x) = √((λ₊ − x)(x − λ₋)) / (2π σ² q x)   on [λ₋, λ₊],   λ± = σ² (1 ± √q)².

The spectrum of a trained layer is such a bulk plus some eigenvalues above it ("spikes") that carry structure.

- σ² is fitted to the middle of the spectrum, which contains no spikes: least squares of the eigenvalues on quantiles of
  the law, through the origin (BEMA: Ke, Ma and Lin, arXiv 2006.00436), with the plotting positions (k − ½)/p.
- The largest eigenvalue of pure noise exceeds λ₊ by a Tracy–Widom fluctuation (Johnstone 2001). The edge

      T₊ = σ² [(1 + √q)² + t n^(−2/3) q^(−1/6) (1 + √q)^(4/3)]

  is exceeded by noise with probability `level`; t is the (1 − level) quantile of the Tracy–Widom law of order 1.
- In singular values of W, the bulk ends at σ₊ = √(n λ₊) = σ (√n + √p).
- The null model is the same fit to the layer's own entries in random order: the same values without any structure.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from mpcompile.ir.results import Spectrum

CENTRE = 0.25  # share of the eigenvalues left out of the fit at each end
HEAVY_ENTRIES = 3  # trained layers are known to have one or two outliers, which leave one or two spikes
HEAVY_SHARE = 0.25  # share of the spikes that may come from single entries, if there are HEAVY_ENTRIES or more of these
BINS_TO_EDGE, HISTOGRAM_BINS = 20, 30  # of a histogram: bins of a twentieth of the edge, up to 1.5 times the edge
TAIL = 20  # number of largest eigenvalues from which the tail exponent is estimated
SMALLEST_SIDE = 64  # below this, finite size alone makes the law wrong by more than 0.01


@dataclass(frozen=True, slots=True)
class Fit:
    """A Marchenko–Pastur law fitted to a spectrum, with the distance between the two.

    Attributes:
        p: the smaller side of the weight.
        n: its larger side.
        sigma: σ, fitted to the middle of the spectrum.
        sigma_median: σ from the median eigenvalue alone (Gavish and Donoho).
        edge: √(n T₊), the edge with its Tracy–Widom correction as a singular value of the weight.
        bulk_edge: σ₊ = √(n λ₊), the edge without correction as a singular value of the weight.
        spikes: the number of eigenvalues above T₊.
        spike_mass: their share of the sum of all eigenvalues, which equals their share of ‖W‖².
        bulk_share: the share of eigenvalues in [λ₋, λ₊].
        tail_exponent: Hill's estimate from the TAIL largest eigenvalues, 1 + 1 / mean(log λᵢ − log λ_TAIL); infinite
            if they are all equal.
        central_error: the largest distance between the empirical and the fitted distribution function, over the middle
            half of the spectrum.
        full_error: the same over the whole spectrum.
    """

    p: int
    n: int
    sigma: float
    sigma_median: float
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
    """The ends of the law's support, (λ₋, λ₊), for the aspect ratio q = p/n and the variance σ² of the entries."""
    return variance * (1 - q**0.5) ** 2, variance * (1 + q**0.5) ** 2


def density(x: Float[ndarray, "*n"], q: float, variance: float = 1.0) -> Float[ndarray, "*n"]:
    """The density f of the law at x; 0 outside the support."""
    low, high = support(q, variance)
    inside = np.clip((high - x) * (x - low), 0, None)
    return np.sqrt(inside) / (2 * np.pi * variance * q * np.where(inside > 0, x, 1.0))


def distribution(x: Float[ndarray, "*n"], q: float, variance: float = 1.0) -> Float[ndarray, "*n"]:
    """The distribution function F of the law at x, in closed form; exactly 0 below the support and 1 above it."""
    low, high = support(q, variance)
    y = np.clip(x, low, high)
    root = np.sqrt(np.clip((high - y) * (y - low), 0, None))
    first = np.arcsin(np.clip((2 * y - low - high) / (high - low), -1, 1))
    # At q = 1 the support begins at 0, where the factor of this term is 0.
    ratio = ((low + high) * y - 2 * low * high) / np.where(y > 0, y, 1.0) / (high - low)
    second = np.arcsin(np.clip(ratio, -1, 1))
    value = 0.5 + (root / variance + (1 + q) * first - (1 - q) * second) / (2 * np.pi * q)
    return np.where(x <= low, 0.0, np.where(x >= high, 1.0, np.clip(value, 0, 1)))


def quantile(probability: Float[ndarray, "*n"], q: float, variance: float = 1.0) -> Float[ndarray, "*n"]:
    """The inverse of `distribution`: x with F(x) = probability, by bisection (60 halvings of the support)."""
    ends = support(q, variance)
    low, high = np.full(probability.shape, ends[0]), np.full(probability.shape, ends[1])
    for _ in range(60):
        middle = (low + high) / 2
        below = distribution(middle, q, variance) < probability
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.asarray((low + high) / 2)


# ---- the edge


def tracy_widom_distribution(s: float, nodes: int = 60) -> float:
    """F₁(s), as the Fredholm determinant det(I − ½ Ai((x + y)/2)) on (s, ∞) (Ferrari and Spohn 2005).

    Evaluated by Gauss–Legendre quadrature with `nodes` nodes, after Bornemann, on (s, max(16, s + 16)): the Airy
    function is below 1e-17 beyond 16.
    """
    import scipy.special

    points, weights = np.polynomial.legendre.leggauss(nodes)
    end = max(16.0, s + 16.0)
    x = (end - s) / 2 * points + (end + s) / 2
    root = np.sqrt((end - s) / 2 * weights)
    kernel = scipy.special.airy((x[:, None] + x[None, :]) / 2)[0] / 2
    return float(np.linalg.det(np.eye(nodes) - root[:, None] * kernel * root[None, :]))


@lru_cache(maxsize=32)
def tracy_widom_quantile(probability: float) -> float:
    """The quantile of the Tracy–Widom law of order 1: t with F₁(t) = probability."""
    import scipy.optimize

    return float(scipy.optimize.brentq(lambda s: tracy_widom_distribution(s) - probability, -8.0, 8.0, xtol=1e-10))


def noise_edge(p: int, n: int, variance: float = 1.0, level: float = 0.05) -> float:
    """T₊, which the largest eigenvalue of a pure noise matrix exceeds with probability `level`."""
    q = p / n
    t = tracy_widom_quantile(1 - level)
    return float(variance * ((1 + q**0.5) ** 2 + t * n ** (-2 / 3) * q ** (-1 / 6) * (1 + q**0.5) ** (4 / 3)))


# ---- the fit


def eigenvalues(weight: Float[ndarray, "rows columns"]) -> Float[ndarray, " p"]:
    """The p eigenvalues of W Wᵀ / n in ascending order, computed in float64 from the smaller Gram matrix."""
    import scipy.linalg

    matrix = np.asarray(weight, np.float64)
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    gram = matrix @ matrix.T / matrix.shape[1]
    values = scipy.linalg.eigvalsh(gram, overwrite_a=True, check_finite=False)
    return np.asarray(np.clip(values, 0, None))


def fit_spectrum(values: Float[ndarray, " p"], n: int, level: float = 0.05) -> Fit:
    """The fit to the eigenvalues of W Wᵀ / n, given in ascending order.

    `level` is the probability with which the largest eigenvalue of pure noise exceeds the edge.
    """
    p = len(values)
    q = p / n
    share = (np.arange(p) + 0.5) / p
    centre = (share >= CENTRE) & (share <= 1 - CENTRE)
    expected = quantile(share[centre], q)
    variance = float(expected @ values[centre] / (expected @ expected))
    edge = noise_edge(p, n, variance, level)
    low, high = support(q, variance)
    above = values > edge
    # The empirical distribution function jumps at each eigenvalue: the distance is that of the farther side.
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
    """Raised for a matrix to which the law cannot be fitted; the text is the reason in the report."""


@dataclass(frozen=True, slots=True)
class SpectrumFit:
    """The fit to a weight and the fit to its null model (its own entries in random order).

    `values` are the fitted eigenvalues of W Wᵀ / n in ascending order, `null_values` those of the null model. `null`
    and `null_values` are None if the null model was not requested.
    """

    fit: Fit
    null: Fit | None
    values: Float[ndarray, " p"] = field(repr=False, compare=False)
    null_values: Float[ndarray, " p"] | None = field(default=None, repr=False, compare=False)

    @property
    def summary(self) -> Spectrum:
        """The summary that is stored in the layer's plan."""
        return Spectrum(
            q=self.fit.q,
            sigma=self.fit.sigma,
            edge=self.fit.edge,
            spikes=self.fit.spikes,
            bulk_share=self.fit.bulk_share,
            fit_error=self.fit.central_error,
            null_error=None if self.null is None else self.null.central_error,
            histogram=self._histogram(),
        )

    def _histogram(self) -> tuple[int, ...]:
        """The number of singular values in each of HISTOGRAM_BINS bins of edge / BINS_TO_EDGE, from 0."""
        if not self.fit.edge:
            return ()
        singular = np.sqrt(np.clip(self.values, 0, None) * self.fit.n)
        end = HISTOGRAM_BINS / BINS_TO_EDGE * self.fit.edge
        counts, _ = np.histogram(singular, bins=HISTOGRAM_BINS, range=(0.0, end))
        return tuple(counts.tolist())


def unfolded(weight: Float[ndarray, "out in_ *taps"]) -> Float[ndarray, "out inputs"]:
    """The weight as a matrix: unchanged for a Linear, out × (in_ · kh · kw) for a convolution."""
    return weight.reshape(weight.shape[0], -1)


def analyse(
    weight: Float[ndarray, "out in_ *taps"], *, null: bool = True, level: float = 0.05, seed: int = 0
) -> SpectrumFit:
    """The fit to a layer's weight and, if `null`, to its null model, shuffled with `seed`.

    `level` is the probability with which the largest eigenvalue of pure noise exceeds the edge.

    Raises NoFitError if a weight is not finite or all zero, has a side below SMALLEST_SIDE, has more than half of its
    singular values at zero, or has so heavy-tailed entries that single entries make spikes.
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
    # Rounding leaves the zero eigenvalues of a low-rank matrix at 1e-16 of the largest.
    if np.median(values) <= 1e-12 * values[-1]:
        raise NoFitError("more than half of its singular values are zero: it has no bulk")
    fit = fit_spectrum(values, n, level)
    # A single entry θ > σ (pn)^¼ makes one eigenvalue above the bulk (Baik, Ben Arous and Péché).
    outliers = int((np.abs(matrix) > fit.sigma * (p * n) ** 0.25).sum())
    if outliers >= HEAVY_ENTRIES and outliers > HEAVY_SHARE * fit.spikes:
        raise NoFitError(
            f"its entries are heavy-tailed: {outliers} of them are each large enough to make a spike of their own (it "
            f"has {fit.spikes}), so that a spike need not be structure"
        )
    if not null:
        return SpectrumFit(fit, None, values)
    shuffled = eigenvalues(np.random.default_rng(seed).permuted(matrix.ravel()).reshape(matrix.shape))
    return SpectrumFit(fit, fit_spectrum(shuffled, n, level), values, shuffled)
