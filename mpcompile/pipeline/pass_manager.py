"""The pass manager: runs passes in order, verifies each one, and records what it did.

The manager does not rely on the effect that a pass declares. It runs the model on the example before and after each
pass. It raises an error if the output shape has changed, if an output is not finite, or if the outputs have moved by
more than the effect allows. It also checks that all masks set so far still hold.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from mpcompile.data.images import Data
from mpcompile.errors import LayerFailure, MaskError, MpcompileError, PassError, UsageError
from mpcompile.ir.model import LayerPlan, Model
from mpcompile.ir.parity import relative_difference
from mpcompile.ir.placement import placed
from mpcompile.ir.shapes import run_example
from mpcompile.ir.token_merging import merge_tokens, merges_tokens
from mpcompile.ir.weight_groups import violation
from mpcompile.pipeline.memory_format import memory_format_for
from mpcompile.pipeline.pass_record import Effect, PassRecord
from mpcompile.pipeline.ranks import run_by_ranks, sent
from mpcompile.system.device import CPU, makes_tensors_on
from mpcompile.system.distributed import broadcast, share, together
from mpcompile.system.memory import begin_peak, peak_bytes

# An exact pass may reorder float32 sums. Each of some hundred layers then adds a rounding error of about 1e-7 times the
# square root of a few thousand terms. A difference above 1e-4 of the largest output is not rounding.
EXACT_DRIFT = 1e-4


@runtime_checkable
class Pass(Protocol):
    """A transformation or analysis of a model. Write it as a frozen dataclass whose fields are its configuration.

    `name` is its name in recipes and reports. `requires` names the passes that must come before it.
    """

    name: ClassVar[str]
    effect: ClassVar[Effect]
    requires: ClassVar[tuple[str, ...]]

    def __call__(self, model: Model, data: Data) -> Model:
        """The model after the pass. The pass may edit the graph in place, since the manager works on a copy."""
        ...


@runtime_checkable
class RequiresInputs(Protocol):
    """A pass that can tell before any pass has run whether it can work. Optional."""

    def require_inputs(self, model: Model, data: Data) -> None:
        """Raises a MpcompileError if the pass cannot work on the captured model or these images; changes neither."""
        ...


@runtime_checkable
class CheckpointStore(Protocol):
    """Saves the model after each pass, and loads it when a stopped run resumes (mpcompile/pipeline/checkpoints.py)."""

    def begin(self, model: Model) -> None:
        """Takes the model before the first pass."""
        ...

    def load(self, index: int, model: Model) -> tuple[Model, PassRecord] | None:
        """The model after pass `index` and its record, or None if the pass has to be run."""
        ...

    def save(self, index: int, model: Model, record: PassRecord) -> PassRecord:
        """Saves the model after pass `index`, which was run; returns the record to report."""
        ...


Observer = Callable[[str], None]
Outputs = tuple[Tensor, ...]  # all outputs of a model, the primary one first


@dataclass(frozen=True)
class PassManager:
    """Runs passes in order on a copy of a model. A manager has no state, so it can be used for many models.

    A pass gets held-out images only if it and all passes after it are analyses. `Model.dense` keeps a copy of the graph
    before the first lossy pass. Raises UsageError if a pass comes before one that it requires.
    """

    passes: Sequence[Pass]

    def __post_init__(self) -> None:
        """Checks the order of the passes."""
        earlier: list[str] = []
        for step in self.passes:
            missing = [name for name in step.requires if name not in earlier]
            if missing:
                position = f"after {', '.join(earlier)}" if earlier else "first"
                raise UsageError(f"{step.name} comes {position}, and needs {', '.join(missing)} before it")
            earlier.append(step.name)

    def run(
        self,
        model: Model,
        data: Data,
        observe: Observer = lambda name: None,
        checkpoints: CheckpointStore | None = None,
        before_pass: Callable[[str, Model], None] = lambda name, model: None,
        device: torch.device = CPU,
        ranks: bool = False,
    ) -> tuple[Model, tuple[PassRecord, ...]]:
        """The model after all passes, and one record per pass; `model` is not changed.

        `observe` is called with the name of each pass before it runs. A pass that `checkpoints` can load is not run;
        the loaded model is verified like a result. `before_pass` is called with the name of each pass that is run and
        the model that it gets, which it must not change.

        A pass gets its model and images on `device`, and the tensors that it makes without naming a device are there,
        too. Between passes, where the model is verified and saved, it is on the CPU. With `ranks`, all processes of the
        group call this with the same model and images, and run the passes together (mpcompile/pipeline/ranks.py); only
        rank 0 gives `checkpoints`.

        Raises PassError if a pass fails or changes the outputs by more than its effect allows, MaskError if a mask no
        longer holds.
        """
        with together(ranks):
            return self._run_all(model, data, observe, checkpoints, before_pass, device)

    def _run_all(
        self,
        model: Model,
        data: Data,
        observe: Observer,
        checkpoints: CheckpointStore | None,
        before_pass: Callable[[str, Model], None],
        device: torch.device,
    ) -> tuple[Model, tuple[PassRecord, ...]]:
        """`run`, with the ranks that work together."""
        # A deep copy of graph, modules, weights and masks, so that no pass can edit the caller's model.
        model = replace(model, graph=copy.deepcopy(model.graph), plan=copy.deepcopy(dict(model.plan)))
        records: list[PassRecord] = []
        outputs = run_example(model)
        if checkpoints is not None:
            checkpoints.begin(model)
        for index, step in enumerate(self.passes):
            observe(step.name)
            earlier = [record.name for record in records]
            if step.effect is Effect.LOSSY and model.dense is None:
                model = replace(model, dense=copy.deepcopy(model.graph))
            loaded = checkpoints.load(index, model) if checkpoints is not None else None
            if broadcast(loaded is not None if share().first else None):
                model, record = sent(loaded and loaded[0]), broadcast(loaded and loaded[1])
                outputs, _ = _verify(step, model, model, outputs, earlier)
                records.append(record)
                continue
            with together(False):
                before_pass(step.name, model)
            begin_peak()
            started = time.perf_counter()
            images = data if self.shows_held_out(index) else data.for_passes()
            given = _placed(replace(model, notes=()), device)
            with makes_tensors_on(device):
                on_device = images.on(device, memory_format_for(given))
                result = run_by_ranks(step, partial(_result, step, given, on_device, earlier), given)
            changed = _changed(given, result)
            result = _placed(result, CPU)
            seconds, peak = time.perf_counter() - started, peak_bytes()
            outputs, drift = _verify(step, model, result, outputs, earlier)
            record = PassRecord(step.name, step.effect, seconds, drift, changed, _notes(model, result), peak_bytes=peak)
            model = result
            records.append(record if checkpoints is None else checkpoints.save(index, model, record))
        return model, tuple(records)

    def require_inputs(self, model: Model, data: Data) -> None:
        """Raises a MpcompileError, named by the pass, if a pass says that it cannot work on this model or data."""
        for index, step in enumerate(self.passes):
            if not isinstance(step, RequiresInputs):
                continue
            try:
                step.require_inputs(model, data if self.shows_held_out(index) else data.for_passes())
            except MpcompileError as error:
                raise type(error)(f"{step.name} cannot run: {error}") from error

    def shows_held_out(self, index: int) -> bool:
        """Whether pass `index` gets held-out images: only if it and all passes after it are analyses."""
        return all(step.effect is Effect.ANALYSIS for step in self.passes[index:])


def _placed(model: Model, device: torch.device) -> Model:
    """The model on a device; the model itself if it is there."""
    return model if model.example.device == device else placed(model, device)


def _result(step: Pass, model: Model, data: Data, earlier: Sequence[str]) -> Model:
    """The pass's result, with its graph linted and recompiled.

    A failure becomes an error that names the pass, the layer and the passes before it.
    """
    context = f" after {', '.join(earlier)}" if earlier else ""
    layer = ""
    try:
        try:
            result = step(model, data)
        except LayerFailure as failure:
            layer = f" on {failure.layer}"
            raise (failure.__cause__ or failure) from None
        if not isinstance(result, Model):
            raise TypeError(f"it returned {type(result).__name__}; a pass returns a Model")
        result.graph.graph.lint()
        result.graph.recompile()
    except Exception as error:
        kind = type(error) if isinstance(error, MpcompileError) else PassError
        detail = str(error) if isinstance(error, MpcompileError) else f"{type(error).__name__}: {error}"
        raise kind(f"{step.name} failed{layer}{context}: {detail}") from error
    return result


def _verify(step: Pass, model: Model, result: Model, before: Outputs, earlier: Sequence[str]) -> tuple[Outputs, float]:
    """The outputs on the example after a pass, and their drift.

    Raises PassError if the outputs are not what the pass's effect allows, MaskError if a mask does not hold.
    """
    context = f" (after {', '.join(earlier)})" if earlier else ""
    try:
        after = run_example(result)
    except Exception as error:
        raise PassError(f"{step.name}{context} left a graph that does not run: {error}") from error
    shapes = [[tuple(one.shape) for one in outputs] for outputs in (before, after)]
    if shapes[0] != shapes[1]:
        old, new = (side[0] if len(side) == 1 else side for side in shapes)
        raise PassError(
            f"{step.name}{context} changed the output from {old} to {new}; a pass must keep the output shape"
        )
    if not all(one.isfinite().all() for one in after):
        raise PassError(f"{step.name}{context} left a model whose outputs are not finite")
    drift = max(
        relative_difference(old.double().numpy(force=True), new.double().numpy(force=True))
        for old, new in zip(before, after, strict=True)
    )
    allowed = {Effect.ANALYSIS: 0.0, Effect.EXACT: EXACT_DRIFT, Effect.LOSSY: float("inf")}[step.effect]
    if drift > allowed:
        raise PassError(
            f"{step.name}{context} declares the effect {step.effect}, and moved the outputs by {drift:.1e} of the "
            f"largest output; {allowed:.0e} is allowed"
        )
    for name, plan in {**model.plan, **result.plan}.items():
        was_masked = model.plan_of(name).mask is not None
        now = result.plan_of(name)
        if was_masked and now.mask is None and not now.skipped:
            raise MaskError(
                f"{step.name}{context} removed the mask of {name} without a reason; set skipped in the layer's plan"
            )
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
    """The layers whose plan a pass replaced."""
    return tuple(name for name, plan in after.plan.items() if plan is not before.plan.get(name))


def _notes(before: Model, after: Model) -> tuple[str, ...]:
    """Short notes for the report on the changes of a pass: plan fields, token merges, removed masks, its own notes."""

    def count(model: Model, field: str) -> int:
        return sum(getattr(plan, field) is not None for plan in model.plan.values())

    fields = [field for field in LayerPlan.__dataclass_fields__ if count(after, field) != count(before, field)]
    notes = [f"{field}: {count(after, field)} layers" for field in fields]
    schedule = [node.args[3] for node in after.graph.graph.nodes if node.target is merge_tokens]
    if schedule and not merges_tokens(before.graph.graph):
        notes.append(f"tokens merged after {len(schedule)} attentions: {', '.join(map(str, schedule))}")
    unmasked = [name for name, plan in before.plan.items() if plan.mask is not None and after.plan[name].mask is None]
    if unmasked:
        notes.append(f"masks removed: {', '.join(unmasked)}")
    return (*notes, *after.notes)
