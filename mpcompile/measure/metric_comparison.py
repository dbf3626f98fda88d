"""A metric of the user's own on the dense and on the compressed model, and the interval of its drop."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpcompile.data.metric_values import MetricValues, joined, mean_of

RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class MetricComparison:
    """The means of a metric over the same samples; higher is better.

    `drop` is the dense mean minus the compressed one, in units of the metric. `interval` is its 95 % interval for
    samples of the same distribution: a bootstrap over samples, paired. It is None if the metric returns one number for
    a batch.
    """

    name: str
    dense: float
    compressed: float
    drop: float
    interval: tuple[float, float] | None
    count: int

    @classmethod
    def between(
        cls, name: str, dense: Sequence[MetricValues], compressed: Sequence[MetricValues]
    ) -> "MetricComparison":
        """The comparison of the values of two models on the same batches."""
        before, after = mean_of(dense), mean_of(compressed)
        (ours, _, each), (theirs, _, both) = joined(compressed), joined(dense)
        interval = paired_interval(theirs - ours) if each and both else None
        return cls(name, before, after, before - after, interval, sum(batch.samples for batch in dense))

    def __str__(self) -> str:
        found = f"{abs(self.drop):.4g} {'lost' if self.drop >= 0 else 'gained'}"
        if self.interval is not None:
            low, high = self.interval
            found += f"; 95% confidence interval of the drop: {low:.4g} to {high:.4g}"
        return found


def paired_interval(differences: NDArray[np.float64]) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean of paired differences (samples,); the same for the same numbers."""
    rng = np.random.default_rng(0)
    count = len(differences)
    means = [differences[rng.integers(0, count, count)].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
