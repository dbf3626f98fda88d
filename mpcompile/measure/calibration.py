"""Expected calibration error and the bins of the reliability diagram: is a prediction right as often as it says?

Guo et al., On Calibration of Modern Neural Networks, ICML 2017 (arXiv 1706.04599): predictions are put into 15 bins of
equal width by their predicted probability. The error is Σ (share of the predictions in bin) × |share of right
predictions − mean predicted probability|.
"""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from mpcompile.ir.head import Head, head_for
from mpcompile.measure.confidence import top_probabilities
from mpcompile.measure.model_confidence import Calibration, ReliabilityBin

BINS = 15


def calibration(
    outputs: Tensor | NDArray[Any], labels: Tensor | NDArray[Any], head: Head | None = None
) -> Calibration | None:
    """The calibration of outputs (images, outputs) against labels (images,), or (images, outputs) for multilabel.

    For multilabel each output of an image is a prediction. None if labels do not say which predictions are right:
    outputs that are values, outputs with positions, and ordinal outputs, whose probabilities may be conditional.
    """
    found, truth = torch.as_tensor(outputs), torch.as_tensor(labels)
    rule = head_for(head, found)
    if not rule.decides or found.ndim != 2 or rule.kind == "ordinal":
        return None
    probabilities = top_probabilities(found, rule)
    assert probabilities is not None
    right = (rule.decisions(found) == truth).flatten().double()
    return calibration_of(probabilities, right)


def calibration_of(probabilities: Tensor, right: Tensor) -> Calibration:
    """The calibration of predictions from their probabilities and whether they are right (0 or 1), (predictions,)."""
    index = (probabilities * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
    bins = []
    for n in range(BINS):
        here = index == n
        if count := int(here.sum()):
            means = float(probabilities[here].mean()), float(right[here].mean())
            bins.append(ReliabilityBin(n / BINS, (n + 1) / BINS, count, *means))
    error = sum(row.count * abs(row.right - row.confidence) for row in bins) / max(1, len(probabilities))
    return Calibration(error, tuple(bins))
