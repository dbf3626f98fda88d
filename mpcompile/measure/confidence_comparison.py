"""The confidence of the compressed model beside the dense one's, on the same images."""

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from mpcompile.ir.head import Head, head_for
from mpcompile.ir.results import MarginQuartile
from mpcompile.measure.calibration import Calibration, calibration
from mpcompile.measure.confidence import common_factor, divergence, mean_top_probability
from mpcompile.measure.margin_agreement import agreement_by_margin


@dataclass(frozen=True, slots=True)
class ModelConfidence:
    """How confident one model is: the mean probability of its decisions, and their calibration if there are labels."""

    top_probability: float
    calibration: Calibration | None


@dataclass(frozen=True, slots=True)
class ConfidenceComparison:
    """The confidence of both models, and the divergence KL(dense ‖ compressed) of their probabilities.

    Attributes:
        dense: of the dense model.
        compressed: of the compressed model.
        divergence: the mean over images, in nats.
        best_factor: the factor on the compressed logits that minimises the divergence on these images; it keeps every
            decision. Near 1 if the compressed model is as confident as it should be.
        least_divergence: the divergence with that factor: what is not a matter of confidence.
        quartiles: the agreement by quartile of the dense margin, lowest margins first.
    """

    dense: ModelConfidence
    compressed: ModelConfidence
    divergence: float
    best_factor: float
    least_divergence: float
    quartiles: tuple[MarginQuartile, ...]


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
