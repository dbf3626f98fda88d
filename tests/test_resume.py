"""A run that is killed at any moment: the same command goes on, and ends in the same bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mpcompile
from mpcompile.data.images import Data
from mpcompile.driver.artifact import Artifact
from mpcompile.driver.weight_files import MASKS, WEIGHTS
from mpcompile.errors import PassError, UsageError
from mpcompile.pipeline.run_folder import clear, note_written, work_folder, working, written_by
from mpcompile.recipe.schema import Recipe
from mpcompile.testing import tiny_data, tiny_vit

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
QUICK = "bench: {batches: [1], seconds: 0.05}\n"


def survive(
    tmp_path: Path,
    model: Path,
    data: Path,
    recipe: str,
    kills: int,
    limit_s: float,
    surely: tuple[str, ...] = ("nm-mask", "write"),
) -> dict[str, list[str]]:
    """Kills runs, the first ones in the stages `surely`, and lets others go on; compares with an undisturbed run."""
    given = {
        "model": str(model), "data": str(data), "recipe": recipe, "folder": str(tmp_path), "kills": kills, "seed": 0,
        "surely": surely,
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.killed_runs", json.dumps(given)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD, timeout=limit_s, cwd=root)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert len(told["killed"]) == kills
    undisturbed = {name: (tmp_path / "undisturbed" / name).read_bytes() for name in (WEIGHTS, MASKS)}
    for output in told["ended"]:
        for name, content in undisturbed.items():
            assert (tmp_path / output / name).read_bytes() == content, (output, name, told)
        Artifact.open(tmp_path / output).verify()
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"undisturbed", *told["ended"]}, told
    return {name: told[name] for name in ("killed", "ended")}


def test_two_kills(tiny_files: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = QUICK + (
        "passes: [mp-budget, permute, nm-mask, tome: {r: 2}, batch-norm, distill: {epochs: 1, batch: 32, minutes: 0, "
        "policy: null}, certify]\ntarget: eager\ndata: {calibration: 48, validation: 32}\n"
    )
    told = survive(tmp_path, *tiny_files, recipe, kills=2, limit_s=1800, surely=("distill", "write"))
    assert [moment.split(" ")[0] for moment in told["killed"]] == ["distill", "write"]


@pytest.mark.slow
def test_twenty_kills_of_the_demo(example: Path, tmp_path: Path) -> None:
    recipe = QUICK + (
        "passes: [mp-budget: {patterns: ['2:4']}, permute, nm-mask, batch-norm, certify]\ndata: {held_out: 500}\n"
    )
    model, data = example / "model.safetensors", example / "images.npz"
    told = survive(tmp_path, model, data, recipe, kills=20, limit_s=7200)
    where = {moment.split(" ")[0] for moment in told["killed"]}
    assert {"nm-mask", "write"} <= where, told
    print(json.dumps(told, indent=1))


# ---- the front door


def compiled(output: Path, **more: object) -> Artifact:
    """The tiny ViT through the front door."""
    recipe = Recipe.from_yaml(
        QUICK + "passes: [mp-budget: {'null': false}, nm-mask: {criterion: magnitude, refit: none}, certify]\n"
    )
    from mpcompile.testing import TinyMLP

    torch.manual_seed(0)

    class Net(TinyMLP):
        pretrained_cfg = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,)}  # noqa: RUF012

    given = {"recipe": recipe, "data": Data(), "module": Net()} | more
    options = {key: value for key, value in given.items() if key not in ("recipe", "data", "module")}
    return mpcompile.compile(given["module"], given["recipe"], data=given["data"], output=output, **options)  # type: ignore[arg-type]


def test_passes_are_kept_on_demand_and_gone_on_from(tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = compiled(output, keep_passes=True)
    names = ["passes/00-mp-budget.safetensors", "passes/01-nm-mask.safetensors", "passes/02-certify.safetensors"]
    assert [row.name for row in first.report.files if row.name.startswith("passes/")] == names
    first.verify()
    with pytest.raises(UsageError, match="is not empty"):
        compiled(output, start="certify")
    again = compiled(output, start="certify", force=True)
    assert [record.resumed for record in again.report.passes] == [True, True, False]
    assert again.report.passes[0].seconds == first.report.passes[0].seconds
    assert "; taken from a checkpoint |" in (output / "report.md").read_text()
    assert not (output / "passes").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(
        UsageError, match="--from certify needs the checkpoint of nm-mask, and there is none in .*out/pass"
    ):
        compiled(output, start="certify", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_keeps_what_was_finished_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("mpcompile.passes.certify.Certify.__call__", lambda self, model, data: None)
        with pytest.raises(PassError, match="certify failed") as failure:
            compiled(output)
    work = tmp_path / ".out.work"
    assert failure.value.__notes__ == [f"finished work is kept in {work}; give the same command again to resume"]
    assert [path.name for path in tmp_path.iterdir()] == [".out.work"]
    again = compiled(output)
    assert [record.resumed for record in again.report.passes] == [True, True, False]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_process_works_on_an_output(tmp_path: Path) -> None:
    with working(tmp_path / "out"):
        with pytest.raises(
            UsageError, match="another process is writing .*out .it has locked .*.out.work.; wait for it, or"
        ):
            compiled(tmp_path / "out")
        compiled(tmp_path / "other")
    compiled(tmp_path / "out")


def test_a_kill_after_the_output_took_its_name(tmp_path: Path) -> None:
    """What is left then is the work folder; the same command finds all done, and another one is refused as ever."""
    output, work = tmp_path / "out", work_folder(tmp_path / "out")
    first = compiled(output)
    seen: dict[str, str] = {}

    def remember(work: Path, written: Path, facts: dict[str, str]) -> None:
        seen.update(facts)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys.modules["mpcompile.driver.compile"], "note_written", remember)
        compiled(output, force=True)
    work.mkdir()
    note_written(work, output, seen)
    assert written_by(output) == seen
    stamp = (output / WEIGHTS).stat().st_mtime_ns
    again = compiled(output)
    assert (output / WEIGHTS).stat().st_mtime_ns == stamp
    assert again.report.layers == first.report.layers
    assert not work.exists()
    work.mkdir()
    note_written(work, output, {**seen, "the model": "another"})
    with pytest.raises(UsageError, match="is not empty"):
        compiled(output)
    assert not work.exists()


def test_what_others_put_into_the_work_folder_stays(tmp_path: Path) -> None:
    with working(tmp_path / "out") as work:
        (work / "notes.txt").write_text("x")
        (work / "00-a.safetensors").write_text("x")
        (work / "run-1").mkdir()
    assert [path.name for path in work.iterdir()] == ["notes.txt"]
    clear(tmp_path / "nowhere")


def test_checkpoints_of_data_in_memory(tmp_path: Path) -> None:
    """Images that are no files and no arrays are told by their pixels."""
    model = tiny_vit()
    data = tiny_data(model, 16)
    from mpcompile.pipeline.fingerprint import images_key

    assert images_key(data.calibration) == images_key(tiny_data(model, 16).calibration)
    assert images_key(data.calibration) != images_key(data.held_out)
