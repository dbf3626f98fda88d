"""The gates of a recipe: limits on what the compressed model loses on held-out images, and the measured values."""

from collections.abc import Iterator

from mpcompile.measure.comparison import Comparison
from mpcompile.recipe.schema import Recipe
from mpcompile.report.head_words import accuracy_name
from mpcompile.report.schema import Gate


def gates_of(recipe: Recipe, comparison: Comparison | None) -> tuple[Gate, ...]:
    """The recipe's gates with what was measured; empty without gates or without held-out images.

    The drop is that of accuracy or of the metric. If the dense model's accuracy cannot be right, another gate fails
    with the reason: no drop can be judged then.
    """
    if comparison is None:
        return ()
    return (*_on_accuracy(recipe, comparison), *_on_probabilities(recipe, comparison))


def _on_accuracy(recipe: Recipe, comparison: Comparison) -> Iterator[Gate]:
    """The gate on the drop of accuracy, or of the metric."""
    limit = recipe.gates.max_drop
    if limit is None:
        return
    if comparison.metric is not None:
        found = comparison.metric
        yield Gate(name=f"{found.name} drop", limit=limit, found=found.drop, holds=found.drop <= limit)
        return
    if comparison.dense is None or comparison.compressed is None:
        return
    drop = 100 * (comparison.dense.top1 - comparison.compressed.top1)
    yield Gate(name=f"{accuracy_name(comparison.head)} drop in points", limit=limit, found=drop, holds=drop <= limit)
    reasons = comparison.dense_check.reasons if comparison.dense_check else ()
    if reasons and recipe.gates.dense:
        name = "contradictions of the dense model's accuracy"
        yield Gate(name=name, limit=0, found=len(reasons), holds=False, reason="; ".join(reasons))


def _on_probabilities(recipe: Recipe, comparison: Comparison) -> Iterator[Gate]:
    """The gates on the calibration error and on the divergence. One that was not measured does not hold."""
    found, gates = comparison.confidence, recipe.gates
    if gates.max_ece is not None:
        name, sides = "rise of the calibration error", (found.dense, found.compressed) if found else ()
        errors = [side.calibration.error for side in sides if side.calibration is not None]
        if len(errors) == 2:
            rise = errors[1] - errors[0]
            yield Gate(name=name, limit=gates.max_ece, found=rise, holds=rise <= gates.max_ece)
        else:
            yield _unmeasured("calibration error", name, gates.max_ece)
    if gates.max_kl is not None:
        name = "divergence from the dense model in nats"
        if found is None:
            yield _unmeasured("divergence", name, gates.max_kl)
        else:
            kl = found.divergence
            yield Gate(name=name, limit=gates.max_kl, found=kl, holds=kl <= gates.max_kl)


def _unmeasured(what: str, name: str, limit: float) -> Gate:
    return Gate(
        name=name, limit=limit, found=0, holds=False, reason=f"the {what} of these outputs could not be measured"
    )
