"""Values of a metric over batches of samples, and their mean."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class MetricValues:
    """Values of a metric for a batch of `samples`: (samples,), or one value for the batch."""

    values: NDArray[np.float64]
    count: int
    samples: int


def joined(batches: Sequence[MetricValues]) -> tuple[NDArray[np.float64], NDArray[np.float64], bool]:
    """All values, the number of samples that each stands for, and whether each sample has its own."""
    values = np.concatenate([batch.values for batch in batches])
    weights = np.concatenate([np.full(batch.count, batch.samples / batch.count) for batch in batches])
    return values, weights, all(batch.count == batch.samples for batch in batches)


def mean_of(batches: Sequence[MetricValues]) -> float:
    """The mean over samples."""
    values, weights, _ = joined(batches)
    return float(np.average(values, weights=weights))
