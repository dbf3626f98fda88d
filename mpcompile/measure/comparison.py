"""The result of a comparison of two engines on the same held-out images."""

from dataclasses import dataclass

from mpcompile.ir.head import Head
from mpcompile.measure.changed_answers import ChangedAnswers
from mpcompile.measure.changed_example import ChangedExample
from mpcompile.measure.dense_check import DenseCheck
from mpcompile.measure.intervals import wilson_interval
from mpcompile.measure.metric_comparison import MetricComparison
from mpcompile.measure.model_confidence import ConfidenceComparison
from mpcompile.measure.value_errors import ValueErrors


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Accuracy as shares in [0, 1], and the number of images.

    `top1` is the share of right decisions (mpcompile/ir/head.py): top-1 for classes, exact matches for multilabel.
    """

    top1: float
    top5: float | None  # None if the model has 5 outputs or fewer, or decides by a threshold
    count: int

    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of `top1` for images of the same distribution (Wilson), as shares."""
        return wilson_interval(round(self.top1 * self.count), self.count)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A compressed model compared with the dense one on the same images.

    The logit shift of an image is the maximum over outputs of |logit − dense logit|. `logit_range` is the mean over
    images of the dense model's max − min logit, the scale to compare shifts with; for one output it is the largest
    minus the smallest logit of all images. Outputs that are values (mpcompile/ir/head.py) have no agreement; shift and
    range are then those of all values of an output.
    """

    dense: Accuracy | None  # None if the images have no labels
    compressed: Accuracy | None
    agreement: float | None  # share of images, or of their positions, with the same decision; None for values
    logit_shift_mean: float
    logit_shift_p99: float
    logit_shift_max: float
    logit_range: float
    count: int
    turned: ChangedAnswers | None = None  # top-1 answers that became right or wrong; None if the images have no labels
    head: Head | None = None  # how outputs become decisions
    dense_check: DenseCheck | None = None  # whether the dense model's accuracy can be right
    values: ValueErrors | None = None  # relative error and cosine similarity of outputs that are values
    metric: MetricComparison | None = None  # the user's own, which then replaces accuracy in limits
    confidence: ConfidenceComparison | None = None  # probabilities and their divergence; None for values
    positions: int = 1  # decisions for each image: the positions of a map
    images_sha256: str | None = None  # of the images as the model gets them, with labels; None in earlier reports
    examples: tuple[ChangedExample, ...] = ()  # images whose decision changed
