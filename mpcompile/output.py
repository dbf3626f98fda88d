"""An output folder that appears whole or not at all.

Everything is written into a hidden folder beside it, which takes its name in one rename at the end. A run that
fails removes it; one that is killed outright leaves it, and the next run for the same output removes it then.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mpcompile.errors import UsageError

MARKER = "report.json"  # a folder with this file was written by mpcompile


def require_free(output: Path, force: bool) -> None:
    """Raises UsageError where the output cannot be written, before anything was computed."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UsageError(f"{output} is not a folder; name another with --output")
    if output.exists() and any(output.iterdir()):
        if not force:
            raise UsageError(f"{output} is not empty; name another folder with --output, or replace it with --force")
        if not (output / MARKER).is_file():
            raise UsageError(
                f"{output} was not written by mpcompile (no {MARKER} in it), so --force does not remove it"
            )
    existing = next(parent for parent in output.absolute().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"{existing} cannot be written to; name another folder with --output")


@contextmanager
def written_whole(output: Path, force: bool) -> Iterator[Path]:
    """A folder to write into, which becomes `output` if the block ends well, and is removed if not."""
    require_free(output, force)
    output = output.absolute()
    partial = output.parent / f".{output.name}.partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UsageError(
            f"{output.parent} cannot be written to ({error.strerror}); name another with --output"
        ) from error
    _remove_left_over(output)
    try:
        yield partial
        _swap(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _swap(partial: Path, output: Path) -> None:
    """Puts the new folder in place; the old one, if any, is removed only once that has worked."""
    if not output.exists():
        partial.rename(output)
        return
    old = output.parent / f".{output.name}.old-{os.getpid()}"
    output.rename(old)
    try:
        partial.rename(output)
    except OSError:
        old.rename(output)
        raise
    shutil.rmtree(old)


def _remove_left_over(output: Path) -> None:
    """Removes what killed runs for this output left behind; those of running processes stay."""
    for folder in output.parent.glob(f".{output.name}.partial-*"):
        pid = re.fullmatch(r".*\.partial-(\d+)", folder.name)
        if pid and not _is_running(int(pid[1])):
            shutil.rmtree(folder, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
