"""The hidden folder beside an output in which the work of its run is kept, and the lock that one run has on it.

`.NAME.work` belongs to the output NAME. It holds what finished passes changed (mpcompile/pipeline/checkpoints.py) and,
while a long pass runs, what it has finished (mpcompile/pipeline/partial_results.py). It goes when the output is there,
and stays when a run ends before that, whatever the reason, so that the same command goes on.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mpcompile.errors import MpcompileError, ResourceError, UsageError
from mpcompile.system.atomic_folder import REPORT
from mpcompile.system.hashing import file_sha256
from mpcompile.system.resource_errors import shortage

WRITTEN, REWOUND = "written.json", "from.json"  # what the run has written last, and from where it was to start
FINISHED = ("*.safetensors", "run-*")
UNFINISHED = ("*.partial", WRITTEN, REWOUND)


def work_folder(output: Path) -> Path:
    """Where the work for an output is kept."""
    output = output.resolve()
    return output.with_name(f".{output.name}.work")


@contextmanager
def working(output: Path) -> Iterator[Path]:
    """The work folder, locked: it is removed if the block ends well, and kept where it holds finished work if not.

    Raises UsageError where another process works on the same output.
    """
    folder = work_folder(output)
    lock = _locked(folder, output)
    try:
        yield folder
    except BaseException as error:
        kept = any(True for pattern in FINISHED for _ in folder.glob(pattern))
        if not kept:
            clear(folder)
        elif isinstance(error, MpcompileError) and not isinstance(error, UsageError):
            error.add_note(f"finished work is kept in {folder}, and the same command goes on from it")
        raise
    else:
        clear(folder)
    finally:
        os.close(lock)


def clear(folder: Path) -> None:
    """Removes what a run keeps; the folder too, unless somebody has put something else into it."""
    for pattern in (*FINISHED, *UNFINISHED):
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _locked(folder: Path, output: Path) -> int:
    """A handle of the folder with the lock on it."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY)
        except OSError as error:
            if found := shortage(error, "the start", folder.parent):
                raise ResourceError(found) from error
            raise UsageError(
                f"{folder.parent} cannot be written to ({error.strerror}); name another with --output"
            ) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            raise UsageError(
                f"another process is writing {output} (it holds {folder}); wait for it, or name another with --output"
            ) from error
        # The run before may have removed the folder between our opening it and our lock.
        if folder.is_dir() and os.fstat(handle).st_ino == folder.stat().st_ino:
            return handle
        os.close(handle)


def note_written(work: Path, written: Path, facts: Mapping[str, str]) -> None:
    """Remembers that a folder is about to become the output of a run of these facts."""
    content = {"report": file_sha256(written / REPORT), "facts": dict(facts)}
    with suppress(OSError):  # what it saves is the last moment of a run
        (work / WRITTEN).write_text(json.dumps(content), encoding="utf-8")


def written_by(output: Path) -> Mapping[str, str] | None:
    """The facts of a run that was killed when its output was already in its place, else None."""
    content = _read(work_folder(output) / WRITTEN)
    report = output / REPORT
    if content is None or not report.is_file() or content.get("report") != file_sha256(report):
        return None
    facts = content.get("facts")
    return facts if isinstance(facts, dict) else None


def was_rewound(work: Path, name: str) -> bool:
    """Whether a run that was to start from that pass has begun and not ended."""
    return (_read(work / REWOUND) or {}).get("from") == name


def note_rewound(work: Path, name: str) -> None:
    """Remembers that the run has begun from that pass."""
    (work / REWOUND).write_text(json.dumps({"from": name}), encoding="utf-8")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
