"""The conditions of `mpcompile compare --fail-if`: METRIC COMPARISON VALUE, parsed and never evaluated as code.

    condition = metric comparison value
    metric    = name [@batch]                  such as top1, speedup@8
    comparison = "<" | "<=" | ">" | ">="
    value     = number ["%" | "points"] | (dense | metric) [("+" | "-") number ["points"]]

Numbers are in the unit of the metric: per cent for top1, so that `dense - 0.5` is 0.5 percentage points below dense. A
metric with one value for each batch size is checked at each of them, unless a batch size is named.
"""

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from mpcompile.errors import UsageError, did_you_mean
from mpcompile.report.compared_metrics import METRICS, RunMetric
from mpcompile.report.compared_schema import CheckedCondition, ComparedRun, Measured

NUMBER = r"\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?"
OPERAND = r"(?P<{0}>[A-Za-z][\w.]*)(?:@(?P<{0}_batch>\d{{1,9}}))?"
CONDITION = re.compile(
    rf"\s*{OPERAND.format('metric')}\s*(?P<sign><=|>=|<|>)\s*"
    rf"(?:(?P<number>[-+]?(?:{NUMBER}))\s*(?P<unit>%|points)?"
    rf"|{OPERAND.format('other')}(?:\s*(?P<plus>[-+])\s*(?P<offset>{NUMBER})(?:\s*points)?)?)\s*",
    re.ASCII,
)
SIGNS: Mapping[str, Callable[[float, float], bool]] = MappingProxyType(
    {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
)
ROUNDING = 1e-9  # relative difference that counts as equal: 100 * 0.8775 is not exactly 88.25 - 0.5


@dataclass(frozen=True, slots=True)
class Operand:
    """A metric, or `dense`, with the batch size that was named."""

    name: str
    batch: int | None

    def __str__(self) -> str:
        return self.name if self.batch is None else f"{self.name}@{self.batch}"


@dataclass(frozen=True, slots=True)
class Condition:
    """A parsed condition: it fails a run if the metric stands in the relation `sign` to the value.

    The value is `offset`, or `other` plus `offset`.
    """

    text: str
    metric: Operand
    sign: str
    other: Operand | None
    offset: float

    @property
    def kind(self) -> RunMetric:
        """The metric on the left side."""
        return METRICS[self.metric.name]


def parse_condition(text: str) -> Condition:
    """The condition in a text. Raises UsageError."""
    found = CONDITION.fullmatch(text)
    if found is None or not all(math.isfinite(float(found[name] or 0)) for name in ("number", "offset")):
        raise UsageError(
            f"--fail-if {text!r} is not METRIC < VALUE; give for example 'top1 < dense - 0.5' (percentage points), "
            "'speedup@8 < 1.2' or 'size_mb > 5'"
        )
    metric = _operand(found, "metric", text)
    other = _operand(found, "other", text) if found["other"] else None
    if other is None:
        return Condition(text, metric, found["sign"], None, _number(found, metric, text))
    if other.name != "dense" and METRICS[other.name].unit != METRICS[metric.name].unit:
        units = [METRICS[one.name].unit or "no unit" for one in (metric, other)]
        raise UsageError(
            f"--fail-if {text!r} compares {metric.name} in {units[0]} with {other.name} in {units[1]}; give two "
            "metrics of one unit"
        )
    offset = float(found["offset"] or 0)
    return Condition(text, metric, found["sign"], other, -offset if found["plus"] == "-" else offset)


def _operand(found: re.Match[str], side: str, text: str) -> Operand:
    """The metric on one side; `dense` is none, and only on the right. Raises UsageError."""
    name, batch = found[side], found[f"{side}_batch"]
    if name not in METRICS and not (side == "other" and name == "dense" and batch is None):
        known = (*METRICS, "dense") if side == "other" else tuple(METRICS)
        raise UsageError(
            f"--fail-if {text!r} names no metric; the metrics are {', '.join(METRICS)}{did_you_mean(name, known)}"
        )
    return Operand(name, None if batch is None else int(batch))


def _number(found: re.Match[str], metric: Operand, text: str) -> float:
    """The number on the right side. Raises UsageError if it looks like a share where the metric is in per cent."""
    value, unit, of = float(found["number"]), found["unit"], METRICS[metric.name].unit
    if unit and not of.startswith(unit):
        raise UsageError(f"--fail-if {text!r}: {metric.name} is in {of or 'no unit'}; leave {unit} out")
    if of == "%" and not unit and 0 < abs(value) <= 1:
        raise UsageError(
            f"--fail-if {text!r}: {metric.name} is in per cent, and {value:g} may be meant as a share; write "
            f"{100 * value:g}, or {value:g}% for less than one per cent"
        )
    return value


def checked(condition: Condition, run: ComparedRun) -> Iterator[CheckedCondition]:
    """The condition on one run: one result for each batch size that it is about."""
    values, missing = _values(condition.metric, run)
    if missing:
        yield _not_measured(condition, run, missing)
    for value in values:
        yield _judged(condition, run, value)


def _judged(condition: Condition, run: ComparedRun, value: Measured) -> CheckedCondition:
    """The condition on one value."""
    name, unit = condition.metric.name, condition.kind.unit
    limit, shown = condition.offset, ""
    if condition.other is not None:
        base, missing = _base(condition.other, condition.metric.name, run, value)
        if base is None:
            return _not_measured(condition, run, missing, value.batch)
        limit += base
        shown = f"{str(condition.text.partition(condition.sign)[2]).strip()}, which is "
    if not (math.isfinite(value.value) and math.isfinite(limit)):
        return _not_measured(condition, run, f"{name} is {value.value} and the limit {limit}", value.batch)
    difference = value.value - limit
    equal = abs(difference) <= ROUNDING * max(abs(value.value), abs(limit))
    fails = SIGNS[condition.sign](0.0 if equal else difference, 0.0)
    by = "equal to" if equal else f"{_amount(abs(difference), unit, True)} {'above' if difference > 0 else 'below'}"
    at = "" if value.batch is None else f" at batch {value.batch}"
    found = f"{name} is {_amount(value.value, unit)}{at}, {by} {shown}{_amount(limit, unit)}"
    return CheckedCondition(
        condition=condition.text,
        run=run.name,
        state="fails" if fails else "holds",
        sentence=f"{run.name}: {condition.text!r} {'is true' if fails else 'is not true'}: {found}",
        found=value.value,
        limit=limit,
        batch=value.batch,
    )


def _values(operand: Operand, run: ComparedRun) -> tuple[Sequence[Measured], str]:
    """The values of a metric in a run, and why there are none."""
    values = run.metrics.get(operand.name, ())
    if not values:
        return (), f"{operand.name} was not measured; {METRICS[operand.name].needs}"
    if operand.batch is None:
        return values, ""
    if values[0].batch is None:
        return (), f"{operand.name} has no batch size; leave @{operand.batch} out"
    chosen = [value for value in values if value.batch == operand.batch]
    timed = ", ".join(str(value.batch) for value in values)
    return chosen, "" if chosen else f"{operand} was not measured; the batch sizes are {timed}"


def _base(other: Operand, metric: str, run: ComparedRun, value: Measured) -> tuple[float | None, str]:
    """The value of `dense` or of the metric on the right side, at the batch size of `value`; else why there is none."""
    if other.name == "dense":
        missing = f"{metric} has no value of the dense model; compare it with a number"
        return value.dense, "" if value.dense is not None else missing
    values, missing = _values(other, run)
    if not values:
        return None, missing
    if other.batch is not None or values[0].batch is None:
        return values[0].value, ""
    same = [one.value for one in values if one.batch == value.batch]
    return (same[0], "") if same else (None, f"{other.name} has several batch sizes; name one, as {other.name}@8")


def _not_measured(condition: Condition, run: ComparedRun, why: str, batch: int | None = None) -> CheckedCondition:
    return CheckedCondition(
        condition=condition.text,
        run=run.name,
        state="not measured",
        sentence=f"{run.name}: {condition.text!r} cannot be checked: {why}",
        batch=batch,
    )


def _amount(value: float, unit: str, difference: bool = False) -> str:
    """A number with its unit; the difference of two percentages is in percentage points."""
    name = {"%": "percentage points", "points": "percentage points"}.get(unit, unit) if difference else unit
    digits = f"{value:.3g}" if difference else f"{value:.6g}"
    return f"{digits}{'' if name in ('', '×') else ' '}{name}"
