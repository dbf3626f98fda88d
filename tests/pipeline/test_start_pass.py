"""--from PASS: a run starts from a pass, on the checkpoints of a stopped run or of a finished output."""

from dataclasses import replace
from pathlib import Path

import pytest
from checkpoint_runs import BUDGET, MASKS, Count, Gated, assert_same, run

from mpcompile.errors import UsageError
from mpcompile.passes import Certify
from mpcompile.testing import tiny_vit


def test_a_run_starts_from_the_named_pass(tmp_path: Path) -> None:
    count, work = Count(), tmp_path / "work"
    passes = (BUDGET, MASKS, count, Certify())
    first, _ = run(work, tiny_vit(), passes)
    again, records = run(work, tiny_vit(), passes, start="count")
    assert_same(first, again)
    assert [record.resumed for record in records] == [True, True, False, False]
    # After a kill the same command resumes after the last finished pass, and not from the named pass again.
    _, records = run(work, tiny_vit(), passes, start="count")
    assert all(record.resumed for record in records)
    _, records = run(work, tiny_vit(), passes, start="mp-budget")
    assert not any(record.resumed for record in records)


def test_a_run_starts_from_a_pass_of_a_finished_output(tmp_path: Path) -> None:
    before, after = Count("before"), Count("after")
    first, _ = run(tmp_path / "work", tiny_vit(), (BUDGET, Gated(), MASKS, before))
    (tmp_path / "work").rename(tmp_path / "finished")
    again, records = run(tmp_path / "work", tiny_vit(), (BUDGET, Gated(), MASKS, after), start="count")
    assert [record.resumed for record in records] == [True, True, True, False]
    assert len(after.calls) == 1
    assert_same(first, again)
    assert len(list((tmp_path / "finished").glob("*.safetensors"))) == 4


def test_start_passes_without_a_valid_checkpoint_are_refused(tmp_path: Path) -> None:
    passes, work = (BUDGET, MASKS, Certify()), tmp_path / "work"
    with pytest.raises(
        UsageError, match="--from 'mask' is not a pass of the recipe; its passes are mp-budget, nm-mask, cert"
    ):
        run(work, tiny_vit(), passes, start="mask")
    with pytest.raises(
        UsageError, match="--from certify needs the checkpoint of nm-mask, and there is none in .*work or "
    ):
        run(work, tiny_vit(), passes, start="certify")
    run(work, tiny_vit(), passes)
    with pytest.raises(
        UsageError, match="--from certify needs the checkpoint of nm-mask: the model changed; run without --from"
    ):
        run(work, tiny_vit(seed=1), passes, start="certify")
    other = (BUDGET, replace(MASKS, damping=0.1), Certify())
    with pytest.raises(UsageError, match=r"the checkpoint of nm-mask: pass 2 \(nm-mask\) changed"):
        run(work, tiny_vit(), other, start="certify")
    _, records = run(work, tiny_vit(), other, start="nm-mask")
    assert [record.resumed for record in records] == [True, False, False]
