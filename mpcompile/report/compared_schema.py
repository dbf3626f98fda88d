"""ComparedRuns: several runs beside their dense models; the JSON of `mpcompile compare` and all numbers of its page."""

from typing import Literal

from mpcompile.report.schema import Value

Aspect = Literal["accuracy", "speed", "size"]


class Measured(Value):
    """One value of a metric in the metric's unit, and that of the run's own dense model if the metric has one.

    `interval` is the 95 % confidence interval, `batch` the batch size of a time or a speedup.
    """

    value: float
    dense: float | None = None
    interval: tuple[float, float] | None = None
    batch: int | None = None


class ComparedRun(Value):
    """One run. `metrics` has no key for what was not measured; a time has one value for each batch size."""

    name: str  # the folder as it was given
    created: str  # ISO 8601, UTC
    version: str  # of mpcompile
    model: str
    arch: str
    target: str
    precision: str
    patterns: tuple[str, ...]
    environment: dict[str, str]
    accuracy_name: str  # what top1 is called for this head, or the name of the user's metric
    headline: str  # the verdict in one sentence
    warnings: tuple[str, ...]
    metrics: dict[str, tuple[Measured, ...]]


class Difference(Value):
    """A fact in which runs differ, so that their values of some aspects cannot be compared.

    `values` has the fact for each run, in the order of the runs; None where a run does not have it.
    """

    fact: str
    spoils: tuple[Aspect, ...]
    values: tuple[str | None, ...]
    sentence: str


class LayerInRun(Value):
    """One layer of one run: `missed` is its refit error, `share` its part of the squared logit shift (first order).

    `speedup` is the time on the dense kernel over the time on the kernel that runs it; None if it was not timed.
    """

    pattern: str | None
    precision: str | None
    density: float
    missed: float | None
    share: float | None
    sparse_kernel: bool | None
    speedup: float | None


class ComparedLayer(Value):
    """One layer in all runs, in their order; None where a run has no layer of this name."""

    name: str
    runs: tuple[LayerInRun | None, ...]


class CheckedCondition(Value):
    """A condition of --fail-if on one run and one batch size. A metric that was not measured counts as a failure."""

    condition: str
    run: str
    state: Literal["holds", "fails", "not measured"]
    sentence: str
    found: float | None = None
    limit: float | None = None
    batch: int | None = None


class ComparedRuns(Value):
    """The content of `mpcompile compare --json`.

    `dense` groups the runs, by index, whose dense models are the same on the same images. `units` has the unit of each
    metric that any run has.
    """

    schema_version: Literal[1] = 1
    version: str  # of mpcompile
    runs: tuple[ComparedRun, ...]
    dense: tuple[tuple[int, ...], ...]
    units: dict[str, str]
    differences: tuple[Difference, ...]
    remarks: tuple[str, ...]
    layers: tuple[ComparedLayer, ...]
    conditions: tuple[CheckedCondition, ...] = ()

    def spoiled(self, aspect: Aspect) -> bool:
        """Whether values of this aspect cannot be compared between all runs."""
        return any(aspect in difference.spoils for difference in self.differences)
