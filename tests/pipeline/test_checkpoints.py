"""Checkpoints of passes: a resumed run gives the same model, and a checkpoint is used only while it is valid."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_runs import BUDGET, MASKS, TRAIN, Count, Gated, assert_same, run
from safetensors import safe_open

from mpcompile.data.images import Data
from mpcompile.errors import MaskError
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.passes import BatchNorm, Certify, NMMask, Permute, Restore, ToMe
from mpcompile.pipeline import fingerprint
from mpcompile.pipeline.checkpoint_file import KEY
from mpcompile.pipeline.checkpoints import Checkpoints
from mpcompile.pipeline.fingerprint import facts_of
from mpcompile.pipeline.pass_manager import Pass, PassManager
from mpcompile.testing import tiny_cnn, tiny_data, tiny_vit

VIT = (BUDGET, Permute(), NMMask(), Restore(max_shift=0.3), TRAIN, Count(), Certify())
CNN = (BUDGET, NMMask(NM(1, 4)), BatchNorm(), Count(), Certify())
MERGING = (MASKS, ToMe(r="auto", macs=0.45, images=8), TRAIN, Count(), Certify())


@pytest.mark.parametrize(
    ("make", "passes"), [(tiny_vit, VIT), (tiny_cnn, CNN), (tiny_vit, MERGING)], ids=["vit", "cnn", "merging"]
)
def test_a_resumed_run_gives_the_same_model(
    make: Callable[[], Model], passes: Sequence[Pass], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make()
    undisturbed, records = PassManager(passes).run(model, tiny_data(model, 32))
    stops = [Count(fails=True) if isinstance(step, Count) else step for step in passes]
    with pytest.raises(Exception, match="stopped here"):
        run(tmp_path / "work", model, stops)
    before = model.graph.state_dict()
    caplog.clear()
    resumed, again = run(tmp_path / "work", model, passes)
    assert_same(undisturbed, resumed)
    stopped_at = [step.name for step in passes].index("count")
    assert [record.resumed for record in again] == [index < stopped_at for index in range(len(passes))]
    assert [record.layers_changed for record in again] == [record.layers_changed for record in records]
    [line] = caplog.messages
    assert line == f"resuming after {passes[stopped_at - 1].name}, from the checkpoints in {tmp_path / 'work'}"
    assert all(
        value is before[name] or torch.equal(value, before[name]) for name, value in model.graph.state_dict().items()
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a run that finished all passes."""
    folder = tmp_path_factory.mktemp("whole") / "work"
    run(folder, tiny_vit(), VIT)
    return folder


def test_a_checkpoint_holds_only_the_tensors_that_changed(work: Path) -> None:
    saved: dict[str, list[str]] = {}
    for path in sorted(work.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            saved[path.stem] = list(file.keys())
    assert list(saved) == [
        "00-mp-budget",
        "01-permute",
        "02-nm-mask",
        "03-restore",
        "04-distill",
        "05-count",
        "06-certify",
    ]
    assert saved["00-mp-budget"] == saved["05-count"] == saved["06-certify"] == []
    assert any(name.startswith("permutation/") for name in saved["01-permute"])
    assert sum(name.startswith("mask/") for name in saved["02-nm-mask"]) == 8
    assert not list(work.glob("run-*")), "partial results of a finished pass are removed"


def test_a_pass_that_changes_the_graph_is_run_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gated, count = Gated(), Count()
    first, _ = run(tmp_path / "work", tiny_vit(), (BUDGET, gated, count))
    again, records = run(tmp_path / "work", tiny_vit(), (BUDGET, gated, count))
    assert_same(first, again)
    assert (len(gated.calls), len(count.calls)) == (2, 1)
    assert [record.resumed for record in records] == [True, True, True]
    assert records[1].notes[-1] == "run again on resume, with the same result"
    # If it gives another model, the checkpoints after it are not used.
    scales = iter((0.5, 0.25))
    changing = Gated(scale=lambda: next(scales))
    run(tmp_path / "other", tiny_vit(), (BUDGET, changing, count))
    caplog.clear()
    _, records = run(tmp_path / "other", tiny_vit(), (BUDGET, changing, count))
    assert len(count.calls) == 3
    assert [record.resumed for record in records] == [True, False, False]
    assert "gated gives a different model than in the stopped run; all later passes are run again" in caplog.messages


def test_passes_that_depend_on_a_change_are_run_again_and_the_change_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, work = tiny_vit(), tmp_path / "work"
    data = tiny_data(model, 32)
    passes = (BUDGET, MASKS, Certify())

    def resumed_with(model: Model, passes: Sequence[Pass], data: Data) -> tuple[str, list[bool]]:
        caplog.clear()
        _, records = run(tmp_path / "work", model, passes, data)
        text = "; ".join(caplog.messages)
        run(work, tiny_vit(), (BUDGET, MASKS, Certify()), tiny_data(tiny_vit(), 32))  # for the next call to resume from
        return text, [record.resumed for record in records]

    assert resumed_with(model, passes, data) == ("", [False, False, False])
    all_again = f"since the run that left {work}; every pass is run again"
    assert resumed_with(tiny_vit(seed=1), passes, data) == (f"the model changed {all_again}", [False] * 3)
    fewer = replace(data, calibration=replace(data.calibration, order=data.calibration.order[:16]))
    assert resumed_with(model, passes, fewer) == (f"the choice of images changed {all_again}", [False] * 3)
    fewer = replace(data, held_out=replace(data.held_out, order=data.held_out.order[:16]))
    after = f"since the run that left {work}; resuming after"
    assert resumed_with(model, passes, fewer) == (f"the held-out images changed {after} nm-mask", [True, True, False])
    other = (BUDGET, replace(MASKS, damping=0.1), Certify())
    assert resumed_with(model, other, data) == (f"pass 2 (nm-mask) changed {after} mp-budget", [True, False, False])
    longer = (BUDGET, MASKS, Count(), Certify())
    text, resumed = resumed_with(model, longer, data)
    assert text == f"pass 3 (count), pass 3 (certify) changed {after} nm-mask"
    assert resumed == [True, True, False, False]
    monkeypatch.setattr(fingerprint, "version", lambda name: "0.0" if name == "torch" else "1")
    text, resumed = resumed_with(model, passes, data)
    assert "torch (" in text
    assert ", now 0.0)" in text
    assert text.endswith("every pass is run again")


def test_a_damaged_checkpoint_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    passes, work = (BUDGET, MASKS, Certify()), tmp_path / "work"
    first, _ = run(work, tiny_vit(), passes)
    mask = work / "01-nm-mask.safetensors"
    content = bytearray(mask.read_bytes())
    for damage, text in (
        (
            bytes(content[:-1]) + bytes([content[-1] ^ 1]),
            "the checkpoint of nm-mask is damaged; this pass and all later ones are run again",
        ),
        (bytes(content[:-9]), "01-nm-mask.safetensors is damaged since the run"),
        (b"", "01-nm-mask.safetensors is damaged since the run"),
    ):
        mask.write_bytes(damage)
        caplog.clear()
        again, records = run(work, tiny_vit(), passes)
        assert text in "; ".join(caplog.messages)
        assert [record.resumed for record in records] == [True, False, False]
        assert_same(first, again)


def test_a_checkpoint_with_a_broken_mask_is_refused(tmp_path: Path) -> None:
    """The hashes of this checkpoint are right; the manager still verifies the loaded model."""
    passes, work = (MASKS, Count()), tmp_path / "work"
    model = tiny_vit()
    checkpoints = Checkpoints(work, passes, facts_of(model, Data(), passes, lambda index: False))
    work.mkdir()
    result, [record, _] = PassManager(passes).run(model, Data())
    with torch.no_grad():
        result.layer("blocks.0.mlp.fc1").weight.fill_(1.0)
    checkpoints.begin(model)
    checkpoints.save(0, result, record)
    with pytest.raises(MaskError, match=r"nm-mask broke the mask of blocks.0.mlp.fc1: \d+ weights"):
        run(work, model, passes, Data())


def test_checkpoints_are_safetensors_files_without_pickle(work: Path) -> None:
    assert len(list(work.iterdir())) == len(VIT)
    for path in work.iterdir():
        assert path.suffix == ".safetensors"
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        assert list(metadata) == [KEY]
        assert json.loads(metadata[KEY])["record"]["name"] in path.name


# ---- a disk without room


def test_a_run_continues_without_checkpoints_on_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    passes, model = (BUDGET, NMMask(), Certify()), tiny_vit()
    undisturbed, _ = PassManager(passes).run(model, tiny_data(model, 32))
    result, records = run(tmp_path / "work", model, passes, reserve_bytes=1 << 60)
    assert_same(undisturbed, result)
    assert not any(record.resumed for record in records)
    assert not list((tmp_path / "work").iterdir())
    first, second = caplog.messages
    assert first == (
        "no checkpoints are saved from mp-budget on (the disk would have no room left for the output); a killed "
        "run repeats these passes"
    )
    assert second.startswith(
        "results of this pass are no longer saved (the disk would have no room left for the output)"
    )


def test_a_run_continues_if_a_checkpoint_cannot_be_written(
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
    assert_same(undisturbed, result)
    assert "no checkpoints are saved from nm-mask on (No space left on device)" in "; ".join(caplog.messages)
    assert [path.name for path in (tmp_path / "work").glob("*.*")] == ["00-mp-budget.safetensors"]
    monkeypatch.undo()
    again, records = run(tmp_path / "work", model, passes)
    assert_same(undisturbed, again)
    assert [record.resumed for record in records] == [True, False, False]
