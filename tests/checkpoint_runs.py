"""Runs of passes with checkpoints, for the tests of resuming: two passes that count their calls, and a comparison."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from mpcompile.data.images import Data
from mpcompile.ir.model import Model
from mpcompile.passes import Distill, MPBudget, NMMask
from mpcompile.pipeline.checkpoint_file import State, rest_of
from mpcompile.pipeline.checkpoints import Checkpoints
from mpcompile.pipeline.fingerprint import facts_of
from mpcompile.pipeline.partial_results import keeping
from mpcompile.pipeline.pass_manager import Pass, PassManager
from mpcompile.pipeline.pass_record import Effect, PassRecord
from mpcompile.testing import tiny_data

BUDGET = MPBudget(null=False)
MASKS = NMMask(criterion="magnitude", refit="none")
TRAIN = Distill(epochs=1, batch=32, warmup=1, rate=1e-3)


@dataclass(frozen=True)
class Count:
    """A pass that does nothing but count its calls, or that fails."""

    name: ClassVar[str] = "count"
    effect: ClassVar[Effect] = Effect.ANALYSIS
    requires: ClassVar[tuple[str, ...]] = ()
    label: str = ""
    calls: list[int] = field(default_factory=list, repr=False, compare=False)
    fails: bool = field(default=False, repr=False)

    def __call__(self, model: Model, data: Data) -> Model:
        self.calls.append(1)
        if self.fails:
            raise RuntimeError("stopped here")
        return model


@dataclass(frozen=True)
class Gated(Count):
    """A pass that inserts a module after the head, so a checkpoint of tensors cannot restore its result.

    The module scales the logits by what `scale` returns.
    """

    name: ClassVar[str] = "gated"
    effect: ClassVar[Effect] = Effect.LOSSY
    scale: Callable[[], float] = field(default=lambda: 0.5, repr=False)

    def __call__(self, model: Model, data: Data) -> Model:
        self.calls.append(1)
        layer = nn.Linear(10, 10)
        with torch.no_grad():
            layer.weight.copy_(self.scale() * torch.eye(10))
            layer.bias.zero_()
        model.graph.add_submodule("gate", layer)
        head = next(node for node in model.graph.graph.nodes if node.target == "head")
        with model.graph.graph.inserting_after(head):
            gate = model.graph.graph.call_module("gate", (head,))
        head.replace_all_uses_with(gate, delete_user_cb=lambda user: user is not gate)
        return model


def run(
    folder: Path,
    model: Model,
    passes: Sequence[Pass],
    data: Data | None = None,
    start: str | None = None,
    **more: object,
) -> tuple[Model, tuple[PassRecord, ...]]:
    """The result of the passes on the model, with checkpoints in the folder; `more` goes to Checkpoints."""
    folder.mkdir(exist_ok=True)
    manager, data = PassManager(passes), data or tiny_data(model, 32)
    facts = facts_of(model, data, passes, manager.shows_held_out)
    checkpoints = Checkpoints(folder, passes, facts, **more)  # type: ignore[arg-type]
    checkpoints.resume(start, folder.parent / "finished")
    with keeping(folder, checkpoints._reserve_bytes):
        return manager.run(model, data, checkpoints=checkpoints)


def assert_same(one: Model, other: Model) -> None:
    """Checks that tensors, plan, certificate, epochs, graph and dense graph are equal."""
    assert State.of(one) == State.of(other)
    assert rest_of(one) == rest_of(other)
    assert (one.dense is None) == (other.dense is None)
    if one.dense is not None and other.dense is not None:
        assert State.of(replace(one, graph=one.dense)) == State.of(replace(other, graph=other.dense))
    assert torch.equal(one(one.example), other(other.example))
