"""The work folder of a run, a hidden folder beside its output, and the lock that lets one run at a time use it.

The folder of the output NAME is `.NAME.work`. It holds the checkpoints of finished passes
(mpcompile/pipeline/checkpoints.py) and, while a long pass runs, the pass's partial results
(mpcompile/pipeline/partial_results.py). It is removed once the output is written. If a run fails or is killed after it
has finished a pass or part of one, the folder stays, so that the same command resumes the run.
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

WRITTEN = "written.json"  # identifies the run whose output is being put in place
REWOUND = "from.json"  # the pass that --from named, once the run has removed later checkpoints
FINISHED = ("*.safetensors", "run-*")
UNFINISHED = ("*.partial", "activations-*", WRITTEN, REWOUND)


def work_folder(output: Path) -> Path:
    """The path of the work folder of an output."""
    output = output.resolve()
    return output.with_name(f".{output.name}.work")


@contextmanager
def working(output: Path) -> Iterator[Path]:
    """The work folder, created and locked for the duration of the block.

    The folder is removed if the block succeeds, or if it fails before any work is finished. Otherwise it stays, and the
    exception gets a note that says so, if it is a signal's or a MpcompileError other than a UsageError.

    Raises UsageError if another process holds the lock, or the folder cannot be created.
    """
    folder = work_folder(output)
    lock = _locked(folder, output)
    try:
        yield folder
    except BaseException as error:
        kept = any(True for pattern in FINISHED for _ in folder.glob(pattern))
        if not kept:
            clear(folder)
        elif not isinstance(error, UsageError) and isinstance(error, MpcompileError | KeyboardInterrupt | SystemExit):
            error.add_note(f"finished work is kept in {folder}; give the same command again to resume")
        raise
    else:
        clear(folder)
    finally:
        os.close(lock)


def clear(folder: Path) -> None:
    """Removes the files of a run from the folder, and the folder itself if nothing else is in it."""
    for pattern in (*FINISHED, *UNFINISHED):
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _locked(folder: Path, output: Path) -> int:
    """An open file descriptor of the folder, which holds an exclusive lock. Raises UsageError or ResourceError."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY)
        except OSError as error:
            if lacking := shortage(error, "the start", folder.parent):
                raise ResourceError(lacking) from error
            raise UsageError(
                f"{folder.parent} cannot be written to ({error.strerror}); name another folder with --output"
            ) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            raise UsageError(
                f"another process is writing {output} (it has locked {folder}); wait for it, or name another "
                "folder with --output"
            ) from error
        # An earlier run may have removed the folder after it was opened here and before it was locked.
        if folder.is_dir() and os.fstat(handle).st_ino == folder.stat().st_ino:
            return handle
        os.close(handle)


def note_written(work: Path, written: Path, facts: Mapping[str, str]) -> None:
    """Records in the work folder that the folder `written` will now be renamed to the output of a run with these facts.

    If the run is killed after that and before the work folder is removed, `written_by` finds the output complete.
    """
    content = {"report": file_sha256(written / REPORT), "facts": dict(facts)}
    with suppress(OSError):  # the record matters only if the run is killed in its last moments
        (work / WRITTEN).write_text(json.dumps(content), encoding="utf-8")


def written_by(output: Path) -> Mapping[str, str] | None:
    """The facts of the run that wrote `output`, if it was killed before it removed its work folder, else None."""
    content = _read(work_folder(output) / WRITTEN)
    report = output / REPORT
    if content is None or not report.is_file() or content.get("report") != file_sha256(report):
        return None
    facts = content.get("facts")
    return facts if isinstance(facts, dict) else None


def was_rewound(work: Path, name: str) -> bool:
    """Whether an unfinished run with `--from name` has already removed the checkpoints from that pass on."""
    return (_read(work / REWOUND) or {}).get("from") == name


def note_rewound(work: Path, name: str) -> None:
    """Records that a run with `--from name` has removed the checkpoints from that pass on."""
    (work / REWOUND).write_text(json.dumps({"from": name}), encoding="utf-8")


def _read(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or None if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
