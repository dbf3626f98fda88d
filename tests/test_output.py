"""The output folder: whole or not at all, and nobody else's files are removed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpcompile.errors import UsageError
from mpcompile.output import MARKER, require_free, written_whole


def write(output: Path, text: str = "new", force: bool = False) -> None:
    with written_whole(output, force) as folder:
        (folder / MARKER).write_text(text)
        assert folder != output


def test_it_appears_whole(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b" / "out")
    assert (tmp_path / "a" / "b" / "out" / MARKER).read_text() == "new"
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["out"]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def half_way(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"), written_whole(tmp_path / "out", False) as folder:
        half_way(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_old_folder(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(RuntimeError), written_whole(tmp_path / "out", True):
        raise RuntimeError
    assert (tmp_path / "out" / MARKER).read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_may_be_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert (tmp_path / "out" / MARKER).is_file()


def test_force_replaces_only_what_mpcompile_wrote(tmp_path: Path) -> None:
    output = tmp_path / "out"
    write(output, "old")
    (output / "engine.bin").write_text("x")
    with pytest.raises(
        UsageError, match="out is not empty; name another folder with --output, or replace it with --force"
    ):
        write(output)
    write(output, force=True)
    assert [path.name for path in output.iterdir()] == [MARKER]
    (output / MARKER).rename(output / "thesis.tex")
    with pytest.raises(UsageError, match="was not written by mpcompile .*so --force does not remove it"):
        write(output, force=True)
    assert (output / "thesis.tex").exists()


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="file is not a folder"):
        require_free(tmp_path / "file", False)
    with pytest.raises(UsageError, match="cannot be written to; name another"):
        write(tmp_path / "file" / "out")
    with pytest.raises(UsageError, match="cannot be written to"):  # for root too, as /proc takes no folders
        write(Path("/proc/mpcompile/out"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_parent(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="cannot be written to"):
        require_free(tmp_path / "out", False)


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left, running = tmp_path / f".out.partial-{dead.pid}", tmp_path / f".out.partial-{os.getppid()}"
    for folder in (left, running):
        folder.mkdir()
    write(tmp_path / "out")
    assert not left.exists()
    assert running.exists()  # its process lives
