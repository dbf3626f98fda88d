"""An output folder that appears whole or not at all.

Everything is written into a hidden folder beside it, which takes its name in one rename at the end. A run that
fails removes it; one that is killed outright leaves it, and the next run for the same output removes it then. A
running process holds a lock on its folder, so that a live one is told from one that was left behind.
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


def require_free(output: Path, force: bool, inputs: Sequence[Path] = ()) -> None:
    """Raises UsageError where the output cannot be written, or where replacing it would remove what is not ours.

    `inputs` are files and folders that the run reads.
    """
    given, output = output, output.resolve()
    if output.exists() and not output.is_dir():
        raise UsageError(f"{given} is not a folder; name another with --output")
    if Path.cwd().is_relative_to(output) or output.is_mount():
        raise UsageError(f"{given} is the working folder, holds it, or is a mount point; name a folder inside it")
    if output.exists() and any(output.iterdir()):
        if not force:
            raise UsageError(f"{given} is not empty; name another folder with --output, or replace it with --force")
        foreign = not_ours(output)
        if foreign:
            listed = ", ".join(foreign[:3]) + (", …" if len(foreign) > 3 else "")
            raise UsageError(f"{given} holds what mpcompile did not write ({listed}), so --force does not replace it")
        inside = [str(path) for path in inputs if path.exists() and path.resolve().is_relative_to(output)]
        if inside:
            raise UsageError(f"{given} holds {inside[0]}, which this run reads, so --force does not replace it")
    existing = next(parent for parent in output.parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"{existing} cannot be written to; name another folder with --output")


def not_ours(folder: Path) -> list[str]:
    """The names in a folder that its report does not list: all of them where there is no report."""
    try:
        content = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        known = {REPORT, "report.md", "report.html", "bench", *(Path(row["name"]).parts[0] for row in content["files"])}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        known = set()
    return sorted(path.name for path in folder.iterdir() if path.name not in known)


@contextmanager
def written_whole(output: Path, force: bool, inputs: Sequence[Path] = ()) -> Iterator[Path]:
    """A folder to write into, which becomes `output` if the block ends well, and is removed if not."""
    require_free(output, force, inputs)
    output = output.resolve()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _tidy(output)
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
    except OSError as error:
        raise UsageError(
            f"{output.parent} cannot be written to ({error.strerror}); name another with --output"
        ) from error
    lock = os.open(partial, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        partial.chmod(0o777 & ~_umask())  # as mkdir would; mkdtemp keeps a folder to its owner
        yield partial
        require_free(output, force, inputs)  # what came in the meantime is not ours to remove
        _swap(partial, output)
    finally:
        os.close(lock)
        shutil.rmtree(partial, ignore_errors=True)


def _swap(partial: Path, output: Path) -> None:
    """Puts the new folder in place; the old one, if any, is removed only once that has worked."""
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
    """Removes what killed runs for this output left; an old output that lost its place gets it back."""
    for folder in list(output.parent.iterdir()):
        if folder.name.startswith(f".{output.name}.old-"):
            if output.exists():
                shutil.rmtree(folder, ignore_errors=True)
            else:
                folder.rename(output)
        elif folder.name.startswith(f".{output.name}.partial-") and not _is_held(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _is_held(folder: Path) -> bool:
    """Whether a running process has the folder's lock."""
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
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
