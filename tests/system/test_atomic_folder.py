"""The output folder: whole or not at all, and nobody else's files are removed."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mpcompile.errors import UsageError
from mpcompile.system.atomic_folder import REPORT, require_writable, written_atomically


def report(text: str) -> str:
    return json.dumps({"text": text, "files": [{"name": "model.onnx"}]})


def written(output: Path) -> str:
    return str(json.loads((output / REPORT).read_text())["text"])


def write(output: Path, text: str = "new", force: bool = False) -> None:
    with written_atomically(output, force) as folder:
        (folder / REPORT).write_text(report(text))
        (folder / "model.onnx").write_text("x")
        assert folder != output


def test_it_appears_whole(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b" / "out")
    assert written(tmp_path / "a" / "b" / "out") == "new"
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["out"]
    (tmp_path / "other").mkdir()
    assert (tmp_path / "a" / "b" / "out").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def half_way(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"), written_atomically(tmp_path / "out", False) as folder:
        half_way(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_old_folder(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(RuntimeError), written_atomically(tmp_path / "out", True):
        raise RuntimeError
    assert written(tmp_path / "out") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_or_a_link_to_one_may_be_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    write(tmp_path / "link")
    assert written(tmp_path / "out") == "new"
    assert (tmp_path / "link").is_symlink()


def test_force_replaces_only_what_mpcompile_wrote(tmp_path: Path) -> None:
    output = tmp_path / "out"
    write(output, "old")
    with pytest.raises(
        UsageError, match="out is not empty; name another folder with --output, or replace it with --force"
    ):
        write(output)
    write(output, force=True)
    assert written(output) == "new"
    (output / "report.sha256").write_text("x")
    write(output, force=True)
    (output / "notes.txt").write_text("x")
    with pytest.raises(
        UsageError, match=r"holds files that mpcompile did not write \(notes.txt\), so --force does not"
    ):
        write(output, force=True)
    (output / REPORT).write_text("{}")
    with pytest.raises(UsageError, match=r"did not write \(model.onnx, notes.txt, report.json\)"):
        write(output, force=True)
    assert (output / "notes.txt").exists()


def test_force_does_not_remove_what_the_run_reads(tmp_path: Path) -> None:
    write(tmp_path / "out")
    with pytest.raises(UsageError, match="model.onnx, which this run reads, so --force does not replace it"):
        require_writable(tmp_path / "out", True, [tmp_path / "out" / "model.onnx"])
    require_writable(tmp_path / "out", True, [tmp_path / "elsewhere.pt", tmp_path])


def test_what_comes_in_the_meantime_is_kept(tmp_path: Path) -> None:
    def meanwhile() -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("x")

    with pytest.raises(UsageError, match="is not empty"), written_atomically(tmp_path / "out", False):
        meanwhile()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious"]


def test_a_signal_during_the_swap_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", "old")
    rename = Path.rename

    def stopped(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise SystemExit(143)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(SystemExit):
        write(tmp_path / "out", force=True)
    assert written(tmp_path / "out") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="file is not a folder"):
        require_writable(tmp_path / "file", False)
    with pytest.raises(UsageError, match="cannot be written to; name another"):
        write(tmp_path / "file" / "out")
    with pytest.raises(UsageError, match="cannot be written to"):  # for root too, as /proc takes no folders
        write(Path("/proc/mpcompile/out"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for output in (Path(), Path(".."), Path("/proc")):
        with pytest.raises(UsageError, match="is the working folder, holds it, or is a mount point"):
            require_writable(output, False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_parent(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="cannot be written to"):
        require_writable(tmp_path / "out", False)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """As a running process holds its folder."""
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    yield
    os.close(handle)


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    left, running = tmp_path / ".o[1].partial-abc", tmp_path / ".o[1].partial-def"
    for folder in (left, running):
        folder.mkdir()
    with held(running):
        write(tmp_path / "o[1]")
    assert not left.exists()
    assert running.exists()


def test_an_output_that_a_killed_run_had_set_aside_comes_back(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    (tmp_path / "out").rename(tmp_path / ".out.old-abc")
    with pytest.raises(RuntimeError), written_atomically(tmp_path / "out", True):
        raise RuntimeError
    assert written(tmp_path / "out") == "old"
    (tmp_path / ".out.old-abc").mkdir()
    write(tmp_path / "out", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
