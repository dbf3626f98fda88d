"""The order of passes that no pass can check alone: what may follow `quantize` and `confidence`."""

from collections.abc import Sequence

from mpcompile.errors import UsageError
from mpcompile.passes import Confidence, Quantize
from mpcompile.pipeline.pass_manager import Pass
from mpcompile.pipeline.pass_record import Effect


def require_order(passes: Sequence[Pass]) -> None:
    """Raises UsageError if a pass comes after `quantize` or `confidence` and undoes what they did.

    The weights would not be in 8 bits any more, or the factor on the logits would not fit them any more.
    """
    names = [step.name for step in passes]
    if Quantize.name in names:
        for step in passes[names.index(Quantize.name) + 1 :]:
            if step.name == Quantize.name:
                raise UsageError("the recipe quantises twice; leave one of the two passes quantize out")
            if step.effect is not Effect.ANALYSIS:
                raise UsageError(
                    f"{step.name} comes after quantize and would change weights that are in 8 bits; put it before "
                    "quantize"
                )
    if Confidence.name in names:
        for step in passes[names.index(Confidence.name) + 1 :]:
            if step.effect is Effect.LOSSY and step.name != Quantize.name:
                raise UsageError(
                    f"{step.name} comes after confidence, whose factor on the logits would not fit the changed model; "
                    "put confidence behind it"
                )
