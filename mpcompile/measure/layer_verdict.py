"""LayerVerdict: whether a masked layer runs on a sparse kernel, and if not, at which step it fails and why.

The steps: masked, mask found in the ONNX file, eligible by the runtime's rules, sparse kernel chosen, timed. A step
that was not checked is None, which means unknown: the engine was not built or does not report its kernels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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

    Times are those of the engine's layer that contains it. After fusion that layer may contain its neighbours too. If
    the layer is applied several times, they are those of its first application that was timed.
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
    speedup: float | None = (
        None  # with sparse kernels, the median over rounds that timed both; None without such rounds
    )

    @property
    def times_as_fast(self) -> float | None:
        """The speedup; without rounds that timed both, the ratio of the two times. None if either is unknown."""
        if self.speedup is not None or not self.dense_ms or not self.sparse_ms:
            return self.speedup
        return self.dense_ms / self.sparse_ms


def one_per_weight(verdicts: Sequence[LayerVerdict], owners: Mapping[str, str]) -> tuple[LayerVerdict, ...]:
    """One verdict for each masked weight, in the order of the first verdicts on it.

    Engines report a verdict for each application of a weight and for each layer that shares it. A weight counts as run
    on a sparse kernel only if all its applications do.

    Args:
        verdicts: those of the engine.
        owners: for each layer the first layer that has the same weight (mpcompile/report/layer_counts.py); a layer that
            is not in it has its own weight.
    """
    groups: dict[str, list[LayerVerdict]] = {}
    for verdict in verdicts:
        groups.setdefault(owners.get(verdict.layer, verdict.layer), []).append(verdict)
    return tuple(_combined(owner, group) for owner, group in groups.items())


def _combined(layer: str, group: Sequence[LayerVerdict]) -> LayerVerdict:
    """One verdict of several on the same weight. The first that keeps it from sparse kernels gives the reason."""
    eligible, chosen = _all_of([v.eligible for v in group]), _all_of([v.chosen for v in group])
    decisive = next((v for v in group if (v.eligible, v.chosen) == (eligible, chosen)), group[0])
    timed = next((v for v in group if v.dense_ms is not None), decisive)
    reason = decisive.reason
    if chosen is False and any(v.chosen for v in group):
        reason = f"not all applications of the weight run on a sparse kernel: {reason}"
    return replace(
        decisive,
        layer=layer,
        eligible=eligible,
        chosen=chosen,
        reason=reason,
        kernel=decisive.kernel if chosen else None,
        dense_ms=timed.dense_ms,
        sparse_ms=timed.sparse_ms,
        speedup=timed.speedup,
    )


def _all_of(values: Sequence[bool | None]) -> bool | None:
    """False if any value is False, else None if any is unknown, else True."""
    return False if False in values else None if None in values else True


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
