"""A run that is stopped or killed: it leaves no output, and the next run continues from its finished layers."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commandline import QUICK, mpcompile
from dying_run import exporting

from mpcompile.pipeline.partial_results import PartialResults

EXPORTING = "passes: [{nm-mask: {pattern: 2:4, criterion: magnitude, refit: none}}]\n" + QUICK


def dying(moment: dict[str, object], *words: object) -> subprocess.CompletedProcess[str]:
    """Runs `mpcompile` in a process that sends itself a signal at the given moment."""
    command = [sys.executable, "-m", "tests.dying_run", json.dumps(moment), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])


def test_a_kill_loses_no_finished_layer(
    tiny_files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model, images), output, quick = tiny_files, tmp_path / "out", tmp_path / "quick.yaml"
    quick.write_text(QUICK)
    words = [model, "--pattern", "2:4", "--data", images, "-o", output, "--config", quick]
    died = dying({"signal": signal.SIGKILL, "after": "part", "count": 3}, *words)
    assert died.returncode == -signal.SIGKILL, died.stderr
    kept = {path.stem for path in (tmp_path / ".out.work").glob("run-*/*.safetensors")}
    assert len(kept) == 3
    computed: list[str] = []
    put = PartialResults.put

    def remember(self: PartialResults, name: str, tensors: dict[str, torch.Tensor]) -> None:
        computed.append(name)
        put(self, name, tensors)

    monkeypatch.setattr(PartialResults, "put", remember)
    done = mpcompile(*words)
    assert done.returncode == 0, done.stderr
    assert len(computed) == 8 - 3  # of 8 layers
    assert not kept & set(computed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "quick.yaml"]
    passes = json.loads((output / "report.json").read_text())["passes"]
    assert [row["resumed"] for row in passes] == [True, True, True, False, False, False, False]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_leaves_no_output(
    tiny_files: tuple[Path, Path], tmp_path: Path, how: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model, images), quick = tiny_files, tmp_path / "quick.yaml"
    quick.write_text(EXPORTING)
    monkeypatch.setattr("mpcompile.driver.run_plan.lower", exporting(lambda: os.kill(os.getpid(), how)))
    # A suite started in the background ignores interrupts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = mpcompile(model, "-o", tmp_path / "out", "--config", quick, "--data", images)
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.returncode == 128 + how
    assert "export compressed" in done.stderr
    by = "Ctrl-C" if how == signal.SIGINT else "SIGTERM"
    kept = f"finished work is kept in {tmp_path / '.out.work'}; give the same command again to resume"
    assert done.stderr.splitlines()[-1] == f"mpcompile: stopped by {by}: {kept}"
    assert "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"quick.yaml", ".out.work"}


def test_a_killed_run_leaves_no_output(tiny_files: tuple[Path, Path], tmp_path: Path) -> None:
    (model, images), output, quick = tiny_files, tmp_path / "out", tmp_path / "quick.yaml"
    quick.write_text(EXPORTING)
    words = [model, "-o", output, "--config", quick, "--data", images]
    died = dying({"signal": signal.SIGKILL, "after": "model.onnx", "count": 1}, *words)
    assert died.returncode == -signal.SIGKILL
    assert not output.exists()
    # A killed process cannot remove its partial folder; the next run for the same output does.
    assert len([path for path in tmp_path.iterdir() if path.name.startswith(".out.partial-")]) == 1
    done = mpcompile(*words, "-q")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "quick.yaml"]
