"""The confidence of a model and its calibration, and those of two models side by side."""

from dataclasses import dataclass

from mpcompile.ir.results import MarginQuartile


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """The predictions whose probability is in (low, high]: their mean probability and the share that is right."""

    low: float
    high: float
    count: int
    confidence: float
    right: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """The expected calibration error, in [0, 1], and the bins that have predictions, by rising probability."""

    error: float
    bins: tuple[ReliabilityBin, ...]


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
