"""LayerVerdict: whether a masked layer runs on a sparse kernel, and if not, at which step it fails and why.

The steps: masked, mask found in the ONNX file, eligible by the runtime's rules, sparse kernel chosen, timed. A step
that was not checked is None, which means unknown: the engine was not built or does not report its kernels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Rule:
    """One condition of a runtime for sparse kernels."""

    name: str
    says: str  # the condition, as a sentence
    source: str  # where it is documented, or how it was observed
    standing: Literal["documented", "observed"]  # whether the vendor documents it, or we observed it


@dataclass(frozen=True, slots=True)
class LayerVerdict:
    """The verdict on one masked layer.

    Times are those of the engine's layer that contains it. After fusion that layer may contain its neighbours too.
    """

    layer: str  # qualified module name
    initializer: str  # its weight in the ONNX file
    op: str
    pattern: str
    eligible: bool | None
    rule: str  # the name of the rule that decided `eligible`
    reason: str  # the step at which the layer fails and why, or that this is unknown
    chosen: bool | None = None  # whether the engine runs it on a sparse kernel
    kernel: str | None = None  # name of the kernel that runs it
    dense_ms: float | None = None  # time a call without sparse kernels
    sparse_ms: float | None = None  # time a call with sparse kernels


def tally(verdicts: Sequence[LayerVerdict]) -> str:
    """A sentence with the numbers of layers that are eligible and that run on sparse kernels."""
    count = len(verdicts)
    eligible = sum(v.eligible is True for v in verdicts)
    sentence = f"{eligible} of {count} masked layers are eligible for sparse kernels by the rules"
    if undecided := sum(v.eligible is None for v in verdicts):
        sentence += f", {undecided} more are not covered by the rules"
    if any(v.chosen is not None for v in verdicts):
        sentence += f"; {sum(v.chosen is True for v in verdicts)} run on them"
        if unknown := sum(v.chosen is None for v in verdicts):
            sentence += f", {unknown} are unknown"
    return f"{sentence}."
