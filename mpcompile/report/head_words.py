"""The words of a report for what a head decides, and for outputs that are values."""

from mpcompile.ir.head import Head
from mpcompile.measure.comparison import Comparison


def accuracy_name(head: Head | None) -> str:
    """The name of the share of right decisions: top-1 for classes, accuracy for a threshold, exact match for labels."""
    return {"sigmoid": "accuracy", "ordinal": "accuracy", "multilabel": "exact match"}.get(
        head.kind if head else "softmax", "top-1"
    )


def shift_name(head: Head | None) -> str:
    """The name of the largest change of an output of an image."""
    return "logit shift" if head is None or head.decides else "change of an output"


def confidence_name(head: Head | None) -> str:
    """The name of the mean probability that a model gives to its decisions."""
    return "mean top probability" if head is None or head.kind == "softmax" else "mean probability of a decision"


def same_answer_name(comparison: Comparison) -> str:
    """The name of the share of equal decisions, of images or of the positions of a map."""
    return "same answer as dense" if comparison.positions == 1 else "positions with the dense model's class"


def agreement_sentence(comparison: Comparison) -> str:
    """How far the outputs on held-out images are those of the dense model: equal decisions, or errors of values."""
    c = comparison
    if c.values is not None:
        error, cosine = c.values, f"{c.values.cosine_mean:.4f} on average and {c.values.cosine_min:.4f} at least"
        return (
            f"On {c.count:,} held-out images, the outputs differ from the dense model's by "
            f"{error.relative_error_mean:.2%} on average (relative error; {error.relative_error_max:.2%} at most). "
            f"Their cosine similarity is {cosine}."
        )
    if c.agreement is None:
        return ""
    if c.positions > 1:
        return (
            f"On {c.count:,} images, {c.agreement:.2%} of the positions have the class that the dense model gives them."
        )
    return f"On {c.count:,} images, {c.agreement:.2%} of the predictions are the dense model's."
