"""An output folder that appears complete or not at all.

The run writes into a hidden folder beside the output, and renames it at the end. A run that fails removes the hidden
folder. A run that is killed leaves it, and the next run for the same output removes it. A running process holds a lock
on its hidden folder, so that other runs do not remove it.
"""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mpcompile.errors import UsageError

REPORT = "report.json"


def require_writable(output: Path, force: bool, inputs: Sequence[Path] = ()) -> None:
    """Raises UsageError if `output` cannot be written, or holds files that mpcompile did not write.

    A folder that is not empty is replaced only with `force`. `inputs` are the files and folders that the run reads;
    they must not lie inside a folder that is replaced.
    """
    given = output
    try:
        output = given.resolve()
        output.exists()
    except OSError as error:  # a name that is too long, or a folder that may not be read
        raise UsageError(f"{given} cannot be used ({error.strerror}); name another with --output") from error
    if output.exists() and not output.is_dir():
        raise UsageError(f"{given} is not a folder; name another folder with --output")
    if Path.cwd().is_relative_to(output) or output.is_mount():
        raise UsageError(f"{given} is the working folder, holds it, or is a mount point; name a folder inside it")
    if output.exists() and any(output.iterdir()):
        if not force:
            raise UsageError(f"{given} is not empty; name another folder with --output, or replace it with --force")
        foreign = foreign_names(output)
        if foreign:
            listed = ", ".join(foreign[:3]) + (", …" if len(foreign) > 3 else "")
            raise UsageError(
                f"{given} holds files that mpcompile did not write ({listed}), so --force does not replace it"
            )
        inside = [str(path) for path in inputs if path.exists() and path.resolve().is_relative_to(output)]
        if inside:
            raise UsageError(f"{given} holds {inside[0]}, which this run reads, so --force does not replace it")
    existing = next(parent for parent in output.parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"{existing} cannot be written to; name another folder with --output")


def foreign_names(folder: Path) -> list[str]:
    """The names in `folder` (files and folders) that its report.json does not list; all names if there is no report."""
    try:
        content = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        listed = (Path(row["name"]).parts[0] for row in content["files"])
        known = {REPORT, "report.md", "report.html", "report.sha256", "bench", *listed}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        known = set()
    return sorted(path.name for path in folder.iterdir() if path.name not in known)


@contextmanager
def written_atomically(output: Path, force: bool, inputs: Sequence[Path] = ()) -> Iterator[Path]:
    """Yields an empty folder to write into. It becomes `output` when the block ends. An exception removes it.

    Raises UsageError as `require_writable` does, before the block and again after it.
    """
    require_writable(output, force, inputs)
    output = output.resolve()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _tidy(output)
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
    except OSError as error:
        raise UsageError(
            f"{output.parent} cannot be written to ({error.strerror}); name another folder with --output"
        ) from error
    lock = os.open(partial, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        partial.chmod(0o777 & ~_umask())  # as mkdir does; mkdtemp makes a folder that only its owner can read
        yield partial
        require_writable(output, force, inputs)  # files may have appeared in `output` meanwhile
        _swap(partial, output)
    finally:
        os.close(lock)
        shutil.rmtree(partial, ignore_errors=True)


def _swap(partial: Path, output: Path) -> None:
    """Renames the new folder to `output`; an old output is deleted only after that has succeeded."""
    if not output.exists():
        partial.rename(output)
        return
    old = partial.with_name(partial.name.replace(".partial-", ".old-"))
    output.rename(old)
    try:
        partial.rename(output)
    except BaseException:  # a signal too
        old.rename(output)
        raise
    shutil.rmtree(old)


def _tidy(output: Path) -> None:
    """Removes folders left by killed runs for this output; restores an old output that was renamed, not replaced."""
    for folder in list(output.parent.iterdir()):
        if folder.name.startswith(f".{output.name}.old-"):
            if output.exists():
                shutil.rmtree(folder, ignore_errors=True)
            else:
                folder.rename(output)
        elif folder.name.startswith(f".{output.name}.partial-") and not _is_held(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _is_held(folder: Path) -> bool:
    """Whether a running process holds the lock of the folder."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def _umask() -> int:
    """The umask of the process. (It can only be read by setting it.)"""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
