"""Finished layers: a pass that was stopped or killed loads them, and a full disk does not stop a pass."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mpcompile.errors import PassError
from mpcompile.ir.pattern import NM
from mpcompile.passes import NMMask
from mpcompile.pipeline.partial_results import keeping
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.system.progress import listening
from mpcompile.testing import tiny_data, tiny_vit

HALF = NM(2, 4)


def test_finished_layers_are_loaded_and_not_computed_again(tmp_path: Path) -> None:
    model = tiny_vit()
    data = tiny_data(model, 32)
    whole, _ = PassManager([NMMask(HALF)]).run(model, data)
    kept = tmp_path / "kept"

    class StopError(Exception):
        pass

    def stop_at_fifth(label: str, done: int, count: int) -> None:
        if done == 5:
            raise StopError

    with pytest.raises(PassError, match="StopError"), keeping(kept), listening(stop_at_fifth):
        PassManager([NMMask(HALF)]).run(model, data)
    [run] = kept.iterdir()
    finished = sorted(path.name for path in run.iterdir())
    assert len(finished) == 5
    stamps = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    # A pass with another configuration does not use these files.
    with pytest.raises(PassError), keeping(kept), listening(stop_at_fifth):
        PassManager([NMMask(HALF, damping=0.5)]).run(model, data)
    assert len(list(kept.iterdir())) == 2
    with keeping(kept):
        again, _ = PassManager([NMMask(HALF)]).run(model, data)
        assert {name: (run / name).stat().st_mtime_ns for name in finished} == stamps
    for name, value in whole.graph.state_dict().items():
        assert torch.equal(value, again.graph.state_dict()[name]), name


@pytest.mark.parametrize("full", ["reserve", "write"])
def test_a_full_disk_does_not_stop_the_pass(
    full: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, written = tiny_vit(), Path.write_bytes
    whole, _ = PassManager([NMMask(HALF)]).run(model, tiny_data(model, 16))

    def third_fails(path: Path, content: bytes) -> int:
        if len(list(path.parent.glob("*.safetensors"))) == 2:
            written(path, content[:10])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return written(path, content)

    if full == "write":
        monkeypatch.setattr(Path, "write_bytes", third_fails)
    with keeping(tmp_path / "kept", reserve_bytes=1 << 60 if full == "reserve" else 0):
        result, _ = PassManager([NMMask(HALF)]).run(model, tiny_data(model, 16))
    for name, value in whole.graph.state_dict().items():
        assert torch.equal(value, result.graph.state_dict()[name]), name
    [line] = caplog.messages
    assert line.startswith("results of this pass are no longer saved (")
    kept = [path.suffix for path in (tmp_path / "kept").rglob("*.*")]
    assert kept == ([".safetensors"] * 2 if full == "write" else [])


def test_a_killed_process_leaves_only_complete_files(tmp_path: Path) -> None:
    """SIGKILL during the pass, as by an out-of-memory killer; the next run reads the files."""
    code = (
        "from pathlib import Path\n"
        "from mpcompile.passes import NMMask\n"
        "from mpcompile.pipeline.pass_manager import PassManager\n"
        "from mpcompile.pipeline.partial_results import keeping\n"
        "from mpcompile.testing import tiny_data, tiny_vit\n"
        "model = tiny_vit()\n"
        f"with keeping(Path({str(tmp_path / 'kept')!r})):\n"
        "    while True:\n"
        "        PassManager([NMMask()]).run(model, tiny_data(model))\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code])
    kept = tmp_path / "kept"
    deadline = time.monotonic() + 60
    while not list(kept.glob("run-*/*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    model = tiny_vit()
    with keeping(kept):
        result, _ = PassManager([NMMask()]).run(model, tiny_data(model))
    fresh, _ = PassManager([NMMask()]).run(model, tiny_data(model))
    state = fresh.graph.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in result.graph.state_dict().items())
