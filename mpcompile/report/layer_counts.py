"""LayerCounts: the numbers of layers and weights of a report, from its one table of layers.

The verdict, the summary, the budget table and the verdicts of kernels take their counts from here, so that they agree.
A weight counts once, even if several layers share it or one layer is applied several times.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpcompile.report.schema import LayerRow


@dataclass(frozen=True, slots=True)
class LayerCounts:
    """Counts over the distinct weights of a model.

    Attributes:
        layers: the layers, where those that share a weight count as one.
        masked: those of them that are masked.
        patterns: the number of masked layers by pattern, most frequent first.
        shared: the layers that were not counted because an earlier one has the same weight.
        weights: the weights of all layers, without biases.
        nonzero: those of them that are kept.
    """

    layers: int
    masked: int
    patterns: Mapping[str, int]
    shared: int
    weights: int
    nonzero: int


def count_layers(rows: "Sequence[LayerRow]") -> LayerCounts:
    """The counts of a table of layers."""
    owners = [row for row in rows if row.shares_weight_with is None]
    patterns = Counter(row.pattern for row in owners if row.pattern is not None)
    return LayerCounts(
        layers=len(owners),
        masked=sum(patterns.values()),
        patterns=dict(patterns.most_common()),
        shared=len(rows) - len(owners),
        weights=sum(math.prod(row.shape) for row in owners),
        nonzero=sum(round(row.density * math.prod(row.shape)) for row in owners),
    )


def weight_owners(rows: "Sequence[LayerRow]") -> dict[str, str]:
    """For each layer, by name, the first layer that has the same weight: itself if no earlier one has."""
    return {row.name: row.shares_weight_with or row.name for row in rows}
