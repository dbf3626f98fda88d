"""Several processes under torchrun: the masks and weights of one process, and one line when a rank dies."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
Files = tuple[Path, Path]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for each run, size of the group and rank."""
    folder = tmp_path_factory.mktemp("ranks")
    script = [sys.executable, str(Path(__file__).with_name("several_processes.py")), str(folder)]
    subprocess.run([*script, "vit", "cnn", "distill"], check=True, env=ONE_THREAD)
    return folder


@pytest.mark.parametrize("run", ["vit", "cnn"])
@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_give_the_bits_of_one(results: Path, run: str, size: int) -> None:
    alone = load_file(results / f"{run}-1-0.safetensors")
    assert any(name.startswith("mask/") for name in alone)
    for rank in range(size):
        together = load_file(results / f"{run}-{size}-{rank}.safetensors")
        assert together.keys() == alone.keys()
        assert [name for name, value in alone.items() if not torch.equal(value, together[name])] == []


@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_train_as_one(results: Path, size: int) -> None:
    alone = load_file(results / "distill-1-0.safetensors")
    first, *others = (load_file(results / f"distill-{size}-{rank}.safetensors") for rank in range(size))
    for name, value in alone.items():
        assert all(torch.equal(first[name], other[name]) for other in others)
        # Gradients of the shares are summed in another order.
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6)


RECIPE = """
passes: [nm-mask: {pattern: 2:4}, distill: {batch: 32, optimizer: sgd, rate: 1.0e-3, warmup: 4, epochs: 1}, certify]
target: eager
bench: {batches: [1], seconds: 0.05}
"""


@pytest.fixture(scope="module")
def words(tiny_files: Files, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The words after `mpcompile`, without the output."""
    recipe = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    model, images = map(str, tiny_files)
    return [model, "--config", str(recipe), "--data", images, "-q"]


@pytest.fixture(scope="module")
def alone(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one process."""
    output = tmp_path_factory.mktemp("alone") / "out"
    subprocess.run([sys.executable, "-m", "mpcompile", *words, "-o", str(output)], check=True, env=ONE_THREAD)
    return output


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    started = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    return subprocess.run(
        [sys.executable, *started], check=False, env=ONE_THREAD, cwd=ROOT, capture_output=True, text=True
    )


def of_mpcompile(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines that mpcompile itself wrote; torchrun adds its own summary."""
    return [line for line in done.stderr.splitlines() if line.startswith("mpcompile: ")]


def assert_same_output(one: Path, other: Path) -> None:
    masks = [load_file(folder / "masks.safetensors") for folder in (one, other)]
    assert masks[0].keys() == masks[1].keys()
    assert all(torch.equal(value, masks[1][name]) for name, value in masks[0].items())
    weights = [load_file(folder / "model.safetensors") for folder in (one, other)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-5)  # as distill above, over more steps


def test_a_killed_rank_is_named_and_the_command_resumes(words: list[str], alone: Path, tmp_path: Path) -> None:
    moment = json.dumps({"signal": signal.SIGKILL, "after": "part", "count": 3, "rank": 1})
    died = torchrun("-m", "tests.dying_run", moment, *words, "-o", str(tmp_path / "out"))
    assert died.returncode
    [line] = of_mpcompile(died)
    assert "rank 1 of 2 ended without an error of its own" in line
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".out.work/run-*/*.safetensors"))
    done = torchrun("-m", "mpcompile", *words, "-o", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert_same_output(alone, tmp_path / "out")
    assert not (tmp_path / ".out.work").exists()


def test_a_full_disk_on_one_rank_is_told_once(words: list[str], tmp_path: Path) -> None:
    moment = json.dumps({"after": "full disk", "rank": 1})
    failed = torchrun("-m", "tests.dying_run", moment, *words, "-o", str(tmp_path / "out"), "--memory", "1KB")
    assert failed.returncode
    [line] = of_mpcompile(failed)
    assert line.startswith("mpcompile: rank 1: the disk is full")
    assert not (tmp_path / "out").exists()
