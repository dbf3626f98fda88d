"""Observers: the range of values that an activation's 8-bit grid covers, from a sample of the values.

A wider range clips less and rounds more coarsely. Four rules, of which the pass keeps the one that moves the logits
least:

- `min-max`: all values. Nothing is clipped.
- `percentile`: all but the 0.005 % largest and the 0.005 % smallest values.
- `mse`: the range with the least mean squared error of the quantised values.
- `entropy`: the range whose quantised histogram has the least Kullback–Leibler divergence from the values'
  histogram, as in NVIDIA's "8-bit inference with TensorRT" (S. Migacz, GTC 2017), for both ends of the range.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

Range = tuple[float, float]
Ends = Float[Tensor, "candidates 1"]  # lower or upper ends of ranges, or a value for each range; float64

OUTSIDE = 5e-5  # the share of values beyond each end of the range of `percentile`
CANDIDATES = 80  # ranges that `mse` and `entropy` try for each end
SMALLEST_SHARE = 0.2  # of min-max; the narrowest range that they try
BINS = 2048  # of the histogram
LEVELS = 256
FEWEST_BINS = 128  # in a range of `entropy`, as in Migacz's talk


def min_max(values: Float[Tensor, " n"]) -> Range:
    """The smallest and the largest value."""
    return float(values.min()), float(values.max())


def percentile(values: Float[Tensor, " n"]) -> Range:
    """The range without the OUTSIDE smallest and largest shares of the values."""
    ordered, count = values.sort()[0], len(values)
    cut = int(OUTSIDE * count)
    return float(ordered[cut]), float(ordered[count - 1 - cut])


def least_error(values: Float[Tensor, " n"]) -> Range:
    """The range with the least mean squared error of the values, quantised with 256 levels."""
    centres, counts = _histogram(values)

    def errors(low: Ends, high: Ends) -> Ends:
        scale = (high - low) / (LEVELS - 1)
        quantised = ((centres - low) / scale).round().clamp(0, LEVELS - 1) * scale + low
        return (counts * (quantised - centres).square()).sum(1, keepdim=True)

    return _best(values, errors)


def least_divergence(values: Float[Tensor, " n"]) -> Range:
    """The range whose quantised histogram has the least divergence from that of the values."""
    centres, counts = _histogram(values)
    # The zeros that a rectifier leaves are exact on every grid, and would outweigh everything that clipping costs.
    zero = int(centres.abs().argmin())
    counts[zero] = torch.cat([counts[max(zero - 1, 0) : zero], counts[zero + 1 : zero + 2]]).mean()
    index = torch.arange(BINS)

    def divergences(low: Ends, high: Ends) -> Ends:
        inside = (centres >= low) & (centres <= high)
        first = inside.long().argmax(1, keepdim=True)
        last = first + inside.sum(1, keepdim=True) - 1
        # Values outside the range count at its ends.
        clipped = torch.where(inside, counts, 0)
        clipped.scatter_add_(1, first, torch.where(index < first, counts, 0).sum(1, keepdim=True))
        clipped.scatter_add_(1, last.clamp_min(0), torch.where(index > last, counts, 0).sum(1, keepdim=True))
        level = ((centres - low) / (high - low) * (LEVELS - 1)).round().clamp(0, LEVELS - 1).long()
        occupied = (inside & (counts > 0)).double()
        mass, bins = (
            torch.zeros(len(low), LEVELS, dtype=torch.float64).scatter_add_(1, level, summed)
            for summed in (counts * occupied, occupied)
        )
        quantised = (mass / bins.clamp_min(1)).gather(1, level) * occupied
        p = clipped / counts.sum()
        q = quantised / quantised.sum(1, keepdim=True).clamp_min(torch.finfo(counts.dtype).tiny)
        missing = torch.where(q <= 0, p, 0)
        terms = torch.where((p > 0) & (q > 0), p * (p / q).log(), missing)
        # The values clipped to the end of a range with few bins would hide the ones that it holds: if only the last bin
        # is inside, the two histograms agree.
        enough = inside.sum(1, keepdim=True) >= FEWEST_BINS
        return torch.where(enough, terms.sum(1, keepdim=True), torch.inf)

    return _best(values, divergences)


OBSERVERS: Mapping[str, Callable[[Tensor], Range]] = MappingProxyType(
    {"min-max": min_max, "percentile": percentile, "mse": least_error, "entropy": least_divergence}
)


def _histogram(values: Tensor) -> tuple[Tensor, Tensor]:
    """Centres and counts of BINS bins of equal width from the smallest to the largest value; float64."""
    low, high = float(values.min()), float(values.max())
    counts = torch.histc(values.float(), BINS, low, high).double()
    width = (high - low) / BINS
    return low + width * (torch.arange(BINS, dtype=torch.float64) + 0.5), counts


def _best(values: Tensor, losses: Callable[[Ends, Ends], Ends]) -> Range:
    """The range of the least loss: first both ends are shrunk together towards 0, then each end alone."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    if high <= low:
        return low, high
    shares = torch.linspace(SMALLEST_SHARE, 1, CANDIDATES)[:, None].double()
    whole = torch.ones_like(shares)

    def least(lower: Ends, upper: Ends) -> float:
        return float(shares[losses(low * lower, high * upper).argmin()])

    both = least(shares, shares)
    upper = least(both * whole, shares)
    lower = least(shares, upper * whole)
    return low * lower, high * upper
