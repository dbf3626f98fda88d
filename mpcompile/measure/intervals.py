"""Confidence intervals of a share, and of the difference of two shares of the same trials."""

import math


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share for draws of the same distribution (Wilson)."""
    from scipy.stats import binomtest

    found = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def paired_interval(both: int, gained: int, lost: int, neither: int) -> tuple[float, float]:
    """The 95 % confidence interval of (gained − lost) / trials for draws of the same distribution.

    Two models answer the same trials: `both` are right in both, `gained` only in the second, `lost` only in the first,
    `neither` in none. The method is Newcombe's hybrid of Wilson intervals for paired shares, with a correction for
    continuity of the correlation (Statistics in Medicine 17, 2635–2650, 1998, method 10).
    """
    trials = both + gained + lost + neither
    first, second = both + lost, both + gained
    (low1, high1), (low2, high2) = wilson_interval(first, trials), wilson_interval(second, trials)
    share1, share2 = first / trials, second / trials
    spread = math.sqrt(first * (trials - first) * second * (trials - second))
    product: float = both * neither - gained * lost
    if product > 0:
        product = max(product - trials / 2, 0)
    correlation = product / spread if spread else 0.0
    change = share2 - share1

    def distance(one: float, other: float) -> float:
        """The distance of an end from the change; a negative square is a rounding error."""
        return math.sqrt(max(one**2 - 2 * correlation * one * other + other**2, 0.0))

    below, above = distance(share2 - low2, high1 - share1), distance(high2 - share2, share1 - low1)
    return max(change - below, -1.0), min(change + above, 1.0)
