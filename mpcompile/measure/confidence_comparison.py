"""The confidence of the compressed model beside the dense one's, on the same images."""

from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from mpcompile.ir.head import Head, head_for
from mpcompile.measure.calibration import calibration
from mpcompile.measure.confidence import common_factor, divergence, mean_top_probability
from mpcompile.measure.margin_agreement import agreement_by_margin
from mpcompile.measure.model_confidence import ConfidenceComparison, ModelConfidence


def compare_confidence(
    dense: NDArray[Any] | Tensor,
    compressed: NDArray[Any] | Tensor,
    labels: NDArray[Any] | Tensor | None = None,
    head: Head | None = None,
) -> ConfidenceComparison | None:
    """The comparison of outputs (images, outputs, …); None for outputs that are values.

    `labels` are (images,), or (images, outputs) for multilabel; None if the images have none.
    """
    rule = head_for(head, dense)
    best, raw = common_factor(dense, compressed, rule), divergence(dense, compressed, rule)
    quartiles = agreement_by_margin(dense, compressed, rule)
    if best is None or raw is None or quartiles is None:
        return None
    before, after = (_confidence(side, labels, rule) for side in (dense, compressed))
    return ConfidenceComparison(before, after, raw, best.factor, best.divergence, quartiles)


def _confidence(outputs: NDArray[Any] | Tensor, labels: NDArray[Any] | Tensor | None, head: Head) -> ModelConfidence:
    top = mean_top_probability(outputs, head)
    assert top is not None
    return ModelConfidence(top, None if labels is None else calibration(outputs, labels, head))
