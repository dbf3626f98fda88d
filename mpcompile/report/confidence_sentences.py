"""Sentences on the confidence of the compressed model, and on whom a loss hits."""

from mpcompile.measure.comparison import Comparison
from mpcompile.measure.model_confidence import ConfidenceComparison
from mpcompile.report.head_words import confidence_name

NOTABLE = 0.1  # of the best factor from 1: what a reader who thresholds probabilities would notice


def on_confidence(comparison: Comparison | None, factor: float | None) -> tuple[str, ...]:
    """How confident the compressed model is beside the dense one, and which decisions differ.

    `factor` is the one that the pass confidence folded into the last layers; None if it changed nothing.
    """
    found = comparison.confidence if comparison else None
    if comparison is None or found is None:
        return ()
    before, after = found.dense, found.compressed
    name = confidence_name(comparison.head)
    first = f"The {name} is {after.top_probability:.3f} compressed and {before.top_probability:.3f} dense"
    if before.calibration and after.calibration:
        first += (
            f"; the expected calibration error is {after.calibration.error:.3f} compressed and "
            f"{before.calibration.error:.3f} dense"
        )
    sentences = [f"{first}."]
    if factor is not None:
        sentences.append(f"A factor of {factor:.2f} on the logits, which changes no answer, is in the last layers.")
    if abs(found.best_factor - 1) > NOTABLE:
        sentences.append(
            f"A factor of {found.best_factor:.2f} on these logits would bring the probabilities closest to the dense "
            f"model's on these images: the divergence would be {found.least_divergence:.3g} nats instead of "
            f"{found.divergence:.3g}."
        )
    return (*sentences, *by_margin(found))


def by_margin(found: ConfidenceComparison) -> tuple[str, ...]:
    """The agreement in the lowest and in the highest quarter of the dense margins; empty if every decision agrees."""
    rows = found.quartiles
    if len(rows) < 2 or all(row.agreeing == row.count for row in rows):
        return ()
    return (
        f"Where the dense model's decisions were closest, in the lowest quarter of its margins, "
        f"{rows[0].agreement:.2%} of them are the same; in the highest quarter {rows[-1].agreement:.2%}.",
    )
