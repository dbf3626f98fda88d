"""Whole runs on datasets named as in timm: the report, a second run that goes on, several ranks, and refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import mpcompile as run
from commandline import refused
from dataset_files import write_shards
from safetensors.torch import load_file

import mpcompile
from mpcompile.data.dataset_images import load_dataset_images
from mpcompile.data.dataset_name import dataset_named
from mpcompile.data.divide import Numbers
from mpcompile.data.images import Data
from mpcompile.driver.inputs import path_of
from mpcompile.driver.preprocessing_trials import try_preprocessings
from mpcompile.errors import UsageError
from mpcompile.pipeline import ranks
from mpcompile.pipeline.fingerprint import images_key, training_key
from mpcompile.recipe.schema import read_recipe
from mpcompile.system import distributed
from mpcompile.system.distributed import ProcessRank
from mpcompile.testing import tiny_mlp, tiny_source

ROOT = Path(__file__).parents[1]
QUICK = """
passes: [nm-mask: {pattern: 2:4}, certify]
target: eager
bench: {batches: [1], seconds: 0.05}
data: {calibration: 32, validation: 16, held_out: 40}
"""
Files = tuple[Path, Path]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, [*(f"train-{index:03}.tar" for index in range(20)), "val-000.tar", "val-001.tar"], 30)
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    file.write_text(QUICK, encoding="utf-8")
    return file


def loaded(root: Path, seed: int = 0) -> Data:
    dataset = dataset_named(f"wds/{root}")
    assert dataset is not None
    return load_dataset_images(dataset, tiny_source(), 10, Numbers(32, 16, 40, seed))


def test_a_run_on_shards(tiny_files: Files, shards: Path, recipe: Path, tmp_path: Path) -> None:
    model, output = tiny_files[0], tmp_path / "out"
    done = run(model, "--config", recipe, "--data", f"wds/{shards}", "-o", output, "-q")
    assert done.returncode == 0, done.stderr
    report = json.loads((output / "report.json").read_text())
    told = (
        f"32 calibration and 16 validation images were drawn by seed 0 from split train of wds/{shards} (48 samples of "
        f"16 of 20 shards), and 40 held-out images from split val of wds/{shards} (40 samples of 2 of 2 shards)"
    )
    assert told in report["data"]["notes"]
    assert report["comparison"]["compressed"]["top1"] is not None
    done = run("analyze", model, "--data", f"wds/{shards.name}", "--budget", "sensitivity", "-q", cwd=shards.parent)
    assert done.returncode == 0, done.stderr


def test_the_same_run_goes_on_and_another_sample_does_not(tiny_files: Files, shards: Path, tmp_path: Path) -> None:
    def compiled(seed: int, **more: Any) -> list[bool]:
        file = tmp_path / "recipe.yaml"
        file.write_text(QUICK.replace("held_out: 40", f"held_out: 40, seed: {seed}"), encoding="utf-8")
        chosen = read_recipe(file)
        made = mpcompile.compile(
            tiny_files[0], chosen, data=f"wds/{shards}", output=tmp_path / "out", force=True, keep_passes=True, **more
        )
        return [record.resumed for record in made.report.passes]

    assert compiled(0) == [False, False]
    assert compiled(0, start="certify") == [True, False]
    with pytest.raises(UsageError, match="the choice of images"):
        compiled(1, start="certify")


def test_the_fingerprint_follows_the_shards(shards: Path, tmp_path: Path) -> None:
    assert training_key(loaded(shards)) == training_key(loaded(shards))
    assert training_key(loaded(shards, 1)) != training_key(loaded(shards))
    write_shards(tmp_path, ["train-000.tar", "val-000.tar"], 60)
    before = images_key(loaded(tmp_path).held_out)
    os.utime(tmp_path / "val-000.tar", ns=(1, 1))
    assert images_key(loaded(tmp_path).held_out) != before


def test_ranks_with_other_samples_are_refused(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Orders alone are the same for any sample of a stream: the files behind them are compared."""
    write_shards(tmp_path, [f"train-{index:03}.tar" for index in range(21)], 30)
    write_shards(tmp_path, ["val-000.tar", "val-001.tar"], 30)
    own, other = loaded(shards), loaded(tmp_path)
    assert own.calibration.order == other.calibration.order
    found: list[dict[str, str]] = []
    monkeypatch.setattr(distributed, "process_rank", lambda: ProcessRank(0, 2))  # alone there is nothing to compare
    monkeypatch.setattr(ranks, "broadcast", lambda value: found.append(value) or found[0])  # type: ignore[func-returns-value]
    model = tiny_mlp()
    assert ranks.begin_together(model, own)
    assert ranks.begin_together(model, loaded(shards))
    assert ranks.begin_together(model, other)
    assert found[0] == found[1]
    assert found[0]["images"] != found[2]["images"]


def test_two_processes_give_the_masks_of_one(tiny_files: Files, shards: Path, recipe: Path, tmp_path: Path) -> None:
    words = ["-m", "mpcompile", str(tiny_files[0]), "--config", str(recipe), "--data", f"wds/{shards}", "-q", "-o"]
    group = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for output, command in (("one", words), ("two", [*group, *words])):
        line = [sys.executable, *command, str(tmp_path / output)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(line, check=False, capture_output=True, text=True, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "masks.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_doctor_tries_preprocessings_of_a_dataset(tiny_files: Files, shards: Path) -> None:
    found = try_preprocessings(tiny_files[0], f"wds/{shards}")
    assert found.images == 60
    assert len(found.trials) > 5  # of resize and crop, too


def test_a_path_that_exists_is_no_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert path_of("wds/x") == Path("x")
    assert path_of("wds//x") == Path("/x")
    (tmp_path / "wds" / "x").mkdir(parents=True)
    assert path_of("wds/x") == Path("wds/x")


@pytest.mark.parametrize(
    ("data", "code", "text"),
    [
        ("wds/none", 3, "none is no folder; wds/ takes a folder of shards"),
        ("wds/none,x=y", 2, "has the option 'x'; give train, held_out, image, label, config"),
        ("hfds/./none", 0, ""),
    ],
)
def test_refusals_are_one_line(
    tiny_files: Files, recipe: Path, data: str, code: int, text: str, tmp_path: Path
) -> None:
    done = run(tiny_files[0], "--config", recipe, "--data", data, "-o", tmp_path / "out", "-q")
    if code:
        refused(done, code, text)
    else:  # depends on whether datasets is installed
        assert done.returncode in (3, 7)
        assert len(done.stderr.splitlines()) == 1
