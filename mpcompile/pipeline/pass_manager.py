"""Pass, Effect and PassManager: the order of passes, the checks between them, and the records.

The manager verifies what a pass promises instead of believing it. Around each pass it runs the model on the
example and refuses a changed output shape, numbers that are not finite, and any drift where the effect allows
none; and after each it checks that every mask written so far still holds.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor

from mpcompile.data.images import Data
from mpcompile.errors import LayerFailure, MaskError, MpcompileError, PassError, UsageError
from mpcompile.ir.model import LayerPlan, Model
from mpcompile.ir.parity import relative_difference
from mpcompile.ir.shapes import run_example
from mpcompile.ir.token_merging import merge_tokens, merges_tokens
from mpcompile.ir.weight_groups import violation

# An exact pass may reorder float32 sums: each of some hundred layers adds a rounding of about 1e-7 times the
# root of a few thousand terms. Anything past 1e-4 of the largest output is another function.
EXACT_DRIFT = 1e-4


class Effect(StrEnum):
    """What a pass promises about the model's outputs."""

    ANALYSIS = "analysis"  # not one bit changes
    EXACT = "exact"  # the same function, up to the rounding of reordered sums
    LOSSY = "lossy"  # another function of the same shape


@runtime_checkable
class Pass(Protocol):
    """One transformation. Write it as a frozen dataclass: its fields are its configuration.

    `name` is what recipes and reports call it; `requires` names the passes that must stand before it.
    """

    name: ClassVar[str]
    effect: ClassVar[Effect]
    requires: ClassVar[tuple[str, ...]]

    def __call__(self, model: Model, data: Data) -> Model:
        """The transformed model. The graph may be edited in place: the manager works on a copy."""
        ...


@dataclass(frozen=True, slots=True)
class PassRecord:
    """What the manager saw of one pass. `drift` is max |Δ output| / max |output| on the example."""

    name: str
    effect: Effect
    seconds: float
    drift: float
    layers_changed: tuple[str, ...]
    notes: tuple[str, ...]
    resumed: bool = False  # whether a run that was stopped had done it; the seconds are those that it took then


@runtime_checkable
class Keeper(Protocol):
    """Keeps what passes leave, for a run that goes on (mpcompile/pipeline/checkpoints.py)."""

    def begin(self, model: Model) -> None:
        """Is shown the model before the first pass."""
        ...

    def taken(self, index: int, model: Model) -> tuple[Model, PassRecord] | None:
        """The model after a pass that need not be run, and its record."""
        ...

    def kept(self, index: int, model: Model, record: PassRecord) -> PassRecord:
        """Is shown the model after a pass that was run; the record to report."""
        ...


Observer = Callable[[str], None]


@dataclass(frozen=True)
class PassManager:
    """Runs passes in order over a copy of a model. It keeps no state, so one manager serves many models.

    Held-out images are shown to an analysis after which nothing changes the model, and to no other pass. The graph as
    it was before the first lossy pass stays with the model, as `dense`.
    """

    passes: Sequence[Pass]

    def __post_init__(self) -> None:
        """Refuses an order in which something that a pass requires does not stand before it."""
        earlier: list[str] = []
        for step in self.passes:
            missing = [name for name in step.requires if name not in earlier]
            if missing:
                before = f"after {', '.join(earlier)}" if earlier else "first"
                raise UsageError(f"{step.name} stands {before}, and needs {', '.join(missing)} before it")
            earlier.append(step.name)

    def run(
        self, model: Model, data: Data, observe: Observer = lambda name: None, keeper: Keeper | None = None
    ) -> tuple[Model, tuple[PassRecord, ...]]:
        """The transformed model and a record a pass; the model given is left as it was.

        What `keeper` has of a pass is taken in place of running it, and checked as a result is. Raises PassError where
        a pass fails or breaks its promise, MaskError where a mask no longer holds.
        """
        # Own graph, modules, weights and masks: nothing that a pass edits is reachable from the caller's model.
        model = replace(model, graph=copy.deepcopy(model.graph), plan=copy.deepcopy(dict(model.plan)))
        records: list[PassRecord] = []
        outputs = run_example(model)
        if keeper is not None:
            keeper.begin(model)
        for index, step in enumerate(self.passes):
            observe(step.name)
            earlier = [record.name for record in records]
            if step.effect is Effect.LOSSY and model.dense is None:
                model = replace(model, dense=copy.deepcopy(model.graph))
            found = keeper.taken(index, model) if keeper is not None else None
            if found is not None:
                model, record = found
                outputs, _ = _verify(step, model, model, outputs, earlier)
                records.append(record)
                continue
            started = time.perf_counter()
            result = _attempt(step, model, self._shown(data, index), earlier)
            seconds = time.perf_counter() - started
            outputs, drift = _verify(step, model, result, outputs, earlier)
            changed = _changed(model, result)
            record = PassRecord(step.name, step.effect, seconds, drift, changed, _notes(model, result))
            model = result
            records.append(record if keeper is None else keeper.kept(index, model, record))
        return model, tuple(records)

    def _shown(self, data: Data, index: int) -> Data:
        """The images for a pass: held-out ones only for an analysis after which nothing changes the model."""
        return data if self.shows_held_out(index) else data.for_passes()

    def shows_held_out(self, index: int) -> bool:
        """Whether a pass is shown held-out images."""
        return all(step.effect is Effect.ANALYSIS for step in self.passes[index:])


def _attempt(step: Pass, model: Model, data: Data, earlier: Sequence[str]) -> Model:
    """The pass's result, its graph linted and recompiled; any failure gets its context here, once."""
    context = f" after {', '.join(earlier)}" if earlier else ""
    where = ""
    try:
        try:
            result = step(model, data)
        except LayerFailure as failure:
            where = f" on {failure.layer}"
            raise (failure.__cause__ or failure) from None
        if not isinstance(result, Model):
            raise TypeError(f"it returned {type(result).__name__}; a pass returns a Model")
        result.graph.graph.lint()
        result.graph.recompile()
    except Exception as error:
        kind = type(error) if isinstance(error, MpcompileError) else PassError
        detail = str(error) if isinstance(error, MpcompileError) else f"{type(error).__name__}: {error}"
        raise kind(f"{step.name} failed{where}{context}: {detail}") from error
    return result


def _verify(step: Pass, model: Model, result: Model, before: Tensor, earlier: Sequence[str]) -> tuple[Tensor, float]:
    """The outputs after a pass and their drift, or an error where the pass broke its promise."""
    context = f" (after {', '.join(earlier)})" if earlier else ""
    try:
        after = run_example(result)
    except Exception as error:
        raise PassError(f"{step.name}{context} left a graph that does not run: {error}") from error
    if after.shape != before.shape:
        raise PassError(
            f"{step.name}{context} changed the output from {tuple(before.shape)} to {tuple(after.shape)}; "
            "a pass keeps the model's interface"
        )
    if not after.isfinite().all():
        raise PassError(f"{step.name}{context} left a model whose outputs are not finite")
    drift = relative_difference(before.numpy(force=True), after.numpy(force=True))
    allowed = {Effect.ANALYSIS: 0.0, Effect.EXACT: EXACT_DRIFT, Effect.LOSSY: float("inf")}[step.effect]
    if drift > allowed:
        raise PassError(
            f"{step.name}{context} says it is {step.effect}, and moved the outputs by {drift:.1e} of their "
            f"size; {allowed:.0e} is allowed"
        )
    for name, plan in {**model.plan, **result.plan}.items():
        had = model.plan_of(name).mask is not None
        now = result.plan_of(name)
        if had and now.mask is None and not now.skipped:
            raise MaskError(f"{step.name}{context} dropped the mask of {name} and gave no reason in its plan")
        if plan.mask is None:
            continue
        try:
            broken = violation(result.layer(name), plan)
        except (AttributeError, TypeError) as error:
            broken = f"the layer is gone: {error}"
        if broken:
            raise MaskError(f"{step.name}{context} broke the mask of {name}: {broken}")
    return after, drift


def _changed(before: Model, after: Model) -> tuple[str, ...]:
    """The layers whose plan a pass wrote."""
    return tuple(name for name, plan in after.plan.items() if plan is not before.plan.get(name))


def _notes(before: Model, after: Model) -> tuple[str, ...]:
    """What a pass decided, in a sentence or two for the report."""

    def count(model: Model, field: str) -> int:
        return sum(getattr(plan, field) is not None for plan in model.plan.values())

    fields = [field for field in LayerPlan.__dataclass_fields__ if count(after, field) != count(before, field)]
    notes = [f"{field}: {count(after, field)} layers" for field in fields]
    schedule = [node.args[3] for node in after.graph.graph.nodes if node.target is merge_tokens]
    if schedule and not merges_tokens(before.graph.graph):
        notes.append(f"tokens merged after {len(schedule)} attentions: {', '.join(map(str, schedule))}")
    freed = [name for name, plan in before.plan.items() if plan.mask is not None and after.plan[name].mask is None]
    if freed:
        notes.append(f"masks taken back: {', '.join(freed)}")
    return tuple(notes)
