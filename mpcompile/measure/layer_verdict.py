"""What a runtime makes of each masked layer, step by step, and where a step fails, why.

masked → found again in the file → eligible by the runtime's rules → sparse kernel chosen → timed. A step that was not
looked at is None: that an engine was not built, or does not tell, is neither a yes nor a no.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Rule:
    """One condition of a runtime, where it stands, and whether its maker says so or it was only seen."""

    name: str
    says: str
    source: str
    standing: Literal["documented", "observed"]


@dataclass(frozen=True, slots=True)
class LayerVerdict:
    """One masked layer. `rule` names the rule that decided on `eligible`; `reason` says where its way ends, or that
    nothing is known yet. Times are those of the engine's layer that holds it, which may hold its neighbours too.
    """

    layer: str
    initializer: str
    op: str
    pattern: str
    eligible: bool | None
    rule: str
    reason: str
    chosen: bool | None = None
    kernel: str | None = None
    dense_ms: float | None = None
    sparse_ms: float | None = None


def tally(verdicts: Sequence[LayerVerdict]) -> str:
    """How many layers come how far, in a sentence."""
    count = len(verdicts)
    eligible = sum(v.eligible is True for v in verdicts)
    told = f"{eligible} of {count} masked layers are eligible for sparse kernels by the rules"
    if unsaid := sum(v.eligible is None for v in verdicts):
        told += f", of {unsaid} more the rules say nothing"
    if any(v.chosen is not None for v in verdicts):
        told += f"; {sum(v.chosen is True for v in verdicts)} run on them"
        if unknown := sum(v.chosen is None for v in verdicts):
            told += f", and of {unknown} it is not known"
    return f"{told}."
