"""Checkpoints of passes: taken up to the bit, only where everything still holds, and told when not."""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors import safe_open
from torch import nn

from mpcompile.data.images import Data
from mpcompile.errors import MaskError, UsageError
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.passes import BatchNorm, Certify, Distill, MPBudget, NMMask, Permute, Restore, ToMe
from mpcompile.pipeline import fingerprint
from mpcompile.pipeline.checkpoint_file import KEY, State, rest_of
from mpcompile.pipeline.checkpoints import Checkpoints
from mpcompile.pipeline.fingerprint import facts_of, structure_of
from mpcompile.pipeline.partial_results import keeping
from mpcompile.pipeline.pass_manager import Effect, Pass, PassManager, PassRecord
from mpcompile.testing import tiny_cnn, tiny_data, tiny_vit

BUDGET = MPBudget(null=False)
MASKS = NMMask(criterion="magnitude", refit="none")
TRAIN = Distill(epochs=1, batch=32, warmup=1, rate=1e-3)


@dataclass(frozen=True)
class Count:
    """Does nothing, and counts how often."""

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
    """Puts a module of its own before the head: a change of the graph that only it can make."""

    name: ClassVar[str] = "gated"
    effect: ClassVar[Effect] = Effect.LOSSY
    by: Callable[[], float] = field(default=lambda: 0.5, repr=False)

    def __call__(self, model: Model, data: Data) -> Model:
        self.calls.append(1)
        layer = nn.Linear(10, 10)
        with torch.no_grad():
            layer.weight.copy_(self.by() * torch.eye(10))
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
    """The passes over the model, with checkpoints in the folder."""
    folder.mkdir(exist_ok=True)
    manager, data = PassManager(passes), data or tiny_data(model, 32)
    facts = facts_of(model, data, passes, manager.shows_held_out)
    checkpoints = Checkpoints(folder, passes, facts, **more)  # type: ignore[arg-type]
    checkpoints.go_on(start, folder.parent / "finished")
    with keeping(folder, checkpoints._reserve_bytes):
        return manager.run(model, data, keeper=checkpoints)


def same(one: Model, other: Model) -> None:
    """Every tensor, the plan, the certificate, the epochs and the graph are the same; so is the dense graph."""
    assert State.of(one) == State.of(other)
    assert rest_of(one) == rest_of(other)
    assert (one.dense is None) == (other.dense is None)
    if one.dense is not None and other.dense is not None:
        assert State.of(replace(one, graph=one.dense)) == State.of(replace(other, graph=other.dense))
    assert torch.equal(one(one.example), other(other.example))


VIT = (BUDGET, Permute(), NMMask(), Restore(max_shift=0.3), TRAIN, Count(), Certify())
CNN = (BUDGET, NMMask(NM(1, 4)), BatchNorm(), Count(), Certify())
MERGING = (MASKS, ToMe(r="auto", macs=0.45, images=8), TRAIN, Count(), Certify())


@pytest.mark.parametrize(
    ("make", "passes"), [(tiny_vit, VIT), (tiny_cnn, CNN), (tiny_vit, MERGING)], ids=["vit", "cnn", "merging"]
)
def test_a_run_goes_on_to_the_same_model(
    make: Callable[[], Model], passes: Sequence[Pass], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make()
    undisturbed, records = PassManager(passes).run(model, tiny_data(model, 32))
    stops = [Count(fails=True) if isinstance(step, Count) else step for step in passes]
    with pytest.raises(Exception, match="stopped here"):
        run(tmp_path / "work", model, stops)
    before = model.graph.state_dict()
    caplog.clear()
    taken: list[str] = []
    resumed, again = run(tmp_path / "work", model, passes, on_taken=lambda step: taken.append(step.name))
    same(undisturbed, resumed)
    place = [step.name for step in passes].index("count")
    assert [record.resumed for record in again] == [index < place for index in range(len(passes))]
    assert taken == [step.name for step in passes[:place] if step.name != "tome"]  # which is run again
    assert [record.layers_changed for record in again] == [record.layers_changed for record in records]
    [line] = caplog.messages
    assert line == f"the run goes on after {passes[place - 1].name}, with what {tmp_path / 'work'} holds"
    assert all(
        value is before[name] or torch.equal(value, before[name]) for name, value in model.graph.state_dict().items()
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a whole run keeps."""
    folder = tmp_path_factory.mktemp("whole") / "work"
    run(folder, tiny_vit(), VIT)
    return folder


def test_only_what_changed_is_kept(work: Path) -> None:
    kept: dict[str, list[str]] = {}
    for path in sorted(work.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            kept[path.stem] = list(file.keys())
    assert list(kept) == [
        "00-mp-budget",
        "01-permute",
        "02-nm-mask",
        "03-restore",
        "04-distill",
        "05-count",
        "06-certify",
    ]
    assert kept["00-mp-budget"] == kept["05-count"] == kept["06-certify"] == []
    assert any(name.startswith("permutation/") for name in kept["01-permute"])
    assert sum(name.startswith("mask/") for name in kept["02-nm-mask"]) == 8
    assert not list(work.glob("run-*")), "what a finished pass kept of its work is no longer needed"


def test_a_pass_that_changes_the_graph_is_run_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gated, count = Gated(), Count()
    first, _ = run(tmp_path / "work", tiny_vit(), (BUDGET, gated, count))
    again, records = run(tmp_path / "work", tiny_vit(), (BUDGET, gated, count))
    same(first, again)
    assert (len(gated.calls), len(count.calls)) == (2, 1)
    assert [record.resumed for record in records] == [True, True, True]
    assert records[1].notes[-1] == "run again when the run went on, with the same result"
    # With another result what came after it is worth nothing.
    draws = iter((0.5, 0.25))
    changing = Gated(by=lambda: next(draws))
    run(tmp_path / "other", tiny_vit(), (BUDGET, changing, count))
    caplog.clear()
    _, records = run(tmp_path / "other", tiny_vit(), (BUDGET, changing, count))
    assert len(count.calls) == 3
    assert [record.resumed for record in records] == [True, False, False]
    assert "gated gives another model than it did; what comes after it is run anew" in caplog.messages


def test_what_changed_is_told_and_run_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, work = tiny_vit(), tmp_path / "work"
    data = tiny_data(model, 32)
    passes = (BUDGET, MASKS, Certify())

    def told(model: Model, passes: Sequence[Pass], data: Data) -> tuple[str, list[bool]]:
        caplog.clear()
        _, records = run(tmp_path / "work", model, passes, data)
        text = "; ".join(caplog.messages)
        run(work, tiny_vit(), (BUDGET, MASKS, Certify()), tiny_data(tiny_vit(), 32))  # for the next to go on from
        return text, [record.resumed for record in records]

    assert told(model, passes, data) == ("", [False, False, False])
    anew = f"since the run whose work is in {work}; every pass is run anew"
    assert told(tiny_vit(seed=1), passes, data) == (f"the model changed {anew}", [False] * 3)
    fewer = replace(data, calibration=replace(data.calibration, order=data.calibration.order[:16]))
    assert told(model, passes, fewer) == (f"the choice of images changed {anew}", [False] * 3)
    fewer = replace(data, held_out=replace(data.held_out, order=data.held_out.order[:16]))
    after = f"since the run whose work is in {work}; the run goes on after"
    assert told(model, passes, fewer) == (f"the held-out images changed {after} nm-mask", [True, True, False])
    other = (BUDGET, replace(MASKS, damping=0.1), Certify())
    assert told(model, other, data) == (f"pass 2 (nm-mask) changed {after} mp-budget", [True, False, False])
    longer = (BUDGET, MASKS, Count(), Certify())
    text, resumed = told(model, longer, data)
    assert text == f"pass 3 (count), pass 3 (certify) changed {after} nm-mask"
    assert resumed == [True, True, False, False]
    monkeypatch.setattr(fingerprint, "version", lambda name: "0.0" if name == "torch" else "1")
    text, resumed = told(model, passes, data)
    assert "torch (" in text
    assert ", now 0.0)" in text
    assert text.endswith("every pass is run anew")


def test_a_damaged_checkpoint_is_not_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    passes, work = (BUDGET, MASKS, Certify()), tmp_path / "work"
    first, _ = run(work, tiny_vit(), passes)
    mask = work / "01-nm-mask.safetensors"
    content = bytearray(mask.read_bytes())
    for damage, text in (
        (
            bytes(content[:-1]) + bytes([content[-1] ^ 1]),
            "the checkpoint of nm-mask is damaged; it and what comes after",
        ),
        (bytes(content[:-9]), "01-nm-mask.safetensors is damaged since the run"),
        (b"", "01-nm-mask.safetensors is damaged since the run"),
    ):
        mask.write_bytes(damage)
        caplog.clear()
        again, records = run(work, tiny_vit(), passes)
        assert text in "; ".join(caplog.messages)
        assert [record.resumed for record in records] == [True, False, False]
        same(first, again)


def test_a_mask_that_does_not_hold_is_not_taken(tmp_path: Path) -> None:
    """A checkpoint whose hashes were made to fit: the manager's own check stands behind."""
    passes, work = (MASKS, Count()), tmp_path / "work"
    model = tiny_vit()
    checkpoints = Checkpoints(work, passes, facts_of(model, Data(), passes, lambda index: False))
    work.mkdir()
    result, [record, _] = PassManager(passes).run(model, Data())
    with torch.no_grad():
        result.layer("blocks.0.mlp.fc1").weight.fill_(1.0)
    checkpoints.begin(model)
    checkpoints.kept(0, result, record)
    with pytest.raises(MaskError, match=r"nm-mask broke the mask of blocks.0.mlp.fc1: \d+ weights"):
        run(work, model, passes, Data())


def test_no_pickle_is_in_a_checkpoint(work: Path) -> None:
    assert len(list(work.iterdir())) == len(VIT)
    for path in work.iterdir():
        assert path.suffix == ".safetensors"
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        assert list(metadata) == [KEY]
        assert json.loads(metadata[KEY])["record"]["name"] in path.name


# ---- --from


def test_from_a_pass_on(tmp_path: Path) -> None:
    count, work = Count(), tmp_path / "work"
    passes = (BUDGET, MASKS, count, Certify())
    first, _ = run(work, tiny_vit(), passes)
    again, records = run(work, tiny_vit(), passes, start="count")
    same(first, again)
    assert [record.resumed for record in records] == [True, True, False, False]
    # The same command after a kill goes on where it was, and not from that pass again.
    _, records = run(work, tiny_vit(), passes, start="count")
    assert all(record.resumed for record in records)
    _, records = run(work, tiny_vit(), passes, start="mp-budget")
    assert not any(record.resumed for record in records)


def test_from_a_pass_of_a_finished_output(tmp_path: Path) -> None:
    before, after = Count("before"), Count("after")
    first, _ = run(tmp_path / "work", tiny_vit(), (BUDGET, Gated(), MASKS, before))
    (tmp_path / "work").rename(tmp_path / "finished")
    again, records = run(tmp_path / "work", tiny_vit(), (BUDGET, Gated(), MASKS, after), start="count")
    assert [record.resumed for record in records] == [True, True, True, False]
    assert len(after.calls) == 1
    same(first, again)
    assert len(list((tmp_path / "finished").glob("*.safetensors"))) == 4


def test_from_what_is_not_there(tmp_path: Path) -> None:
    passes, work = (BUDGET, MASKS, Certify()), tmp_path / "work"
    with pytest.raises(
        UsageError, match="--from 'mask' is no pass of the recipe; its passes are mp-budget, nm-mask, cert"
    ):
        run(work, tiny_vit(), passes, start="mask")
    with pytest.raises(
        UsageError, match="--from certify needs the checkpoint of nm-mask, and there is none in .*work or "
    ):
        run(work, tiny_vit(), passes, start="certify")
    run(work, tiny_vit(), passes)
    with pytest.raises(
        UsageError, match="--from certify needs the checkpoint of nm-mask: the model changed; leave --from"
    ):
        run(work, tiny_vit(seed=1), passes, start="certify")
    other = (BUDGET, replace(MASKS, damping=0.1), Certify())
    with pytest.raises(UsageError, match=r"the checkpoint of nm-mask: pass 2 \(nm-mask\) changed"):
        run(work, tiny_vit(), other, start="certify")
    _, records = run(work, tiny_vit(), other, start="nm-mask")
    assert [record.resumed for record in records] == [True, False, False]


# ---- a disk without room


def test_without_room_the_run_goes_on_without_checkpoints(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    passes, model = (BUDGET, NMMask(), Certify()), tiny_vit()
    undisturbed, _ = PassManager(passes).run(model, tiny_data(model, 32))
    result, records = run(tmp_path / "work", model, passes, reserve_bytes=1 << 60)
    same(undisturbed, result)
    assert not any(record.resumed for record in records)
    assert not list((tmp_path / "work").iterdir())
    first, second = caplog.messages
    assert first == (
        "no checkpoint is kept of mp-budget and what follows (the disk would have no room left for the output): after "
        "a kill it is run again"
    )
    assert second.startswith(
        "results of this pass are no longer saved (the disk would have no room left for the output)"
    )


def test_a_checkpoint_that_cannot_be_written_is_no_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, model, written = (BUDGET, MASKS, Certify()), tiny_vit(), Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if "nm-mask" in path.name:
            written(path, content[: len(content) // 2])
            raise OSError(28, "No space left on device", str(path))
        return written(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    undisturbed, _ = PassManager(passes).run(model, tiny_data(model, 32))
    result, _ = run(tmp_path / "work", model, passes)
    same(undisturbed, result)
    assert "no checkpoint is kept of nm-mask and what follows (No space left on device)" in "; ".join(caplog.messages)
    assert [path.name for path in (tmp_path / "work").glob("*.*")] == ["00-mp-budget.safetensors"]
    monkeypatch.undo()
    again, records = run(tmp_path / "work", model, passes)
    same(undisturbed, again)
    assert [record.resumed for record in records] == [True, False, False]


def test_the_hash_of_a_model_tells_every_part_of_it() -> None:
    model = tiny_cnn()
    seen = {fingerprint.model_key(model)}

    def changed(edit: Callable[[Model], Model | None]) -> None:
        other = replace(model, graph=copy.deepcopy(model.graph))
        key = fingerprint.model_key(edit(other) or other)
        assert key not in seen
        seen.add(key)

    @torch.no_grad()
    def weight(other: Model) -> None:
        other.graph.get_parameter("head.weight")[0, 0] += 1e-6

    @torch.no_grad()
    def statistic(other: Model) -> None:
        other.graph.get_buffer("norm.running_var")[0] += 1e-6

    changed(weight)
    changed(statistic)
    changed(lambda other: other.graph.set_submodule("norm", nn.BatchNorm2d(16, eps=1e-3)))
    changed(lambda other: replace(other, example=other.example + 1))
    changed(lambda other: replace(other, source=replace(other.source, mean=(0.4,))))
    assert fingerprint.model_key(tiny_cnn()) == fingerprint.model_key(model)


def test_the_name_that_a_model_was_given_by_is_no_part_of_it() -> None:
    model = tiny_vit()
    other = replace(model, source=replace(model.source, name="./somewhere/else.safetensors"))
    moved = replace(model, source=replace(model.source, mean=(0.25,)))
    assert structure_of(other) == structure_of(model) != structure_of(moved)
