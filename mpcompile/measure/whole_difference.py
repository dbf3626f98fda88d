"""The result of a comparison of a whole model, dense and with its compressed part, on the same images."""

from dataclasses import dataclass

from mpcompile.measure.comparison import Accuracy
from mpcompile.measure.metric_comparison import MetricComparison


@dataclass(frozen=True, slots=True)
class OutputDifference:
    """The difference of one output over all images that are compared.

    Attributes:
        name: its path in what the model returns, such as `logits` or `0.boxes`.
        relative_error: ‖compressed − dense‖ / ‖dense‖, all values together.
        cosine: of the angle between all values of both.
    """

    name: str
    relative_error: float
    cosine: float


@dataclass(frozen=True, slots=True)
class WholeComparison:
    """A whole model with its compressed part, compared with the dense model.

    Attributes:
        images: how many images both ran on.
        comparable: for how many of them both returned outputs of the same structure and shapes.
        outputs: the difference of each output over the comparable images.
        agreement: share of images with the same decision; None if the outputs are no class scores.
        dense: accuracy of the dense model; None without labels or class scores.
        compressed: accuracy of the model with the compressed part.
        metric: the user's own metric of both; None if there is none.
    """

    images: int
    comparable: int
    outputs: tuple[OutputDifference, ...]
    agreement: float | None = None
    dense: Accuracy | None = None
    compressed: Accuracy | None = None
    metric: MetricComparison | None = None
