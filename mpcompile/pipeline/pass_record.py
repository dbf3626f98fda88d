"""What a pass may change in the outputs of a model, and the record of its run."""

from dataclasses import dataclass
from enum import StrEnum


class Effect(StrEnum):
    """How much a pass may change the model's outputs."""

    ANALYSIS = "analysis"  # not at all
    EXACT = "exact"  # the same function, up to rounding of reordered sums
    LOSSY = "lossy"  # the function may change, the output shape may not


@dataclass(frozen=True, slots=True)
class PassRecord:
    """The manager's record of one pass. `drift` is the largest max |Δ output| / max |output| of the outputs."""

    name: str
    effect: Effect
    seconds: float
    drift: float
    layers_changed: tuple[str, ...]
    notes: tuple[str, ...]
    resumed: bool = False  # whether a stopped run had finished it; time and memory are then those of that run
    peak_bytes: int | None = None  # memory of the process at its largest; None if the system does not report it
