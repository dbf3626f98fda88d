"""Errors from a full disk or too little memory, explained in one line: what was found, what was needed, what to do.

Libraries report them differently: an OSError with one of several numbers, a MemoryError, a RuntimeError of torch or
ONNX Runtime, an exception of a library written in Rust. They are recognised by number, type or text, anywhere in the
chain of causes.
"""

import errno
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mpcompile.errors import MpcompileError, ResourceError

FULL = (errno.ENOSPC, errno.EDQUOT)
FULL_TEXTS = ("no space left on device", "disk quota exceeded")
MEMORY_TEXTS = (
    "not enough memory",  # torch's CPU allocator
    "cannot allocate memory",
    "can't allocate memory",
    "out of memory",  # CUDA
    "bad allocation",  # ONNX Runtime
    "bad_alloc",
    "failed to allocate memory",
)
ASKED = re.compile(r"tried to allocate ([\d.,]+ ?\w+)|[Uu]nable to allocate ([\d.]+ \w+)")


@contextmanager
def as_resource_errors(
    during: Callable[[], str], folder: Path, needed_bytes: Callable[[], int | None]
) -> Iterator[None]:
    """Turns errors from a full disk or too little memory inside the block into ResourceErrors.

    `during()` names the current stage, `folder` is where the output is written, `needed_bytes()` is its estimated size.
    """
    try:
        yield
    except ResourceError:
        raise
    except Exception as error:
        found = shortage(error, during(), folder, needed_bytes())
        if found is None:
            raise
        raise ResourceError(found) from error


def shortage(
    error: BaseException, during: str, folder: Path | None = None, needed_bytes: int | None = None
) -> str | None:
    """The text for a user if a full disk or too little memory caused the error or one of its causes; None otherwise.

    `during` names the current stage, `folder` is where the output is written, `needed_bytes` is its estimated size.
    """
    for cause in _chain(error):
        text = (
            "" if isinstance(cause, MpcompileError) else str(cause).lower()
        )  # our own errors quote other errors, which are in the chain themselves
        if isinstance(cause, OSError) and cause.errno == errno.EFBIG:
            limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
            found = (
                f"the limit is {format_bytes(limit)} (ulimit -f)"
                if limit >= 0
                else "the file system allows no larger one"
            )
            return (
                f"a file grew too large during {during}: {found}; raise that limit, or name another folder with "
                "--output"
            )
        if (isinstance(cause, OSError) and cause.errno in FULL) or any(part in text for part in FULL_TEXTS):
            place = Path(str(cause.filename)) if isinstance(cause, OSError) and cause.filename else folder
            needed = f"the whole output takes about {format_bytes(needed_bytes)}" if needed_bytes else "more is needed"
            return (
                f"the disk is full: {_free_at(place)} during {during}, and {needed}; free some space, or name a folder "
                "on another disk with --output"
            )
        out_of_memory = isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno == errno.ENOMEM)
        if out_of_memory or any(part in text for part in MEMORY_TEXTS):
            found_size = ASKED.search(str(cause))
            if "cuda" in text:
                return (
                    f"the memory of the GPU ran out during {during}; use fewer calibration images (--calibration), or "
                    "--device cpu"
                )
            asked = f"{_size(found_size)} more were needed" if found_size else "more was needed"
            return (
                f"memory ran out during {during}: {asked}, and {_memory_left()}; use fewer calibration images "
                "(--calibration) or a smaller batch, or give the process more memory"
            )
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and its chain of causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _free_at(place: Path | None) -> str:
    """The free space on the disk of a file or folder, as a clause."""
    known = next((path for path in (place, *place.parents) if path.is_dir()), None) if place else None
    return f"{format_bytes(shutil.disk_usage(known).free)} are left under {known}" if known else "nothing is left"


def _size(match: re.Match[str]) -> str:
    """The size that an allocator's message names, in readable units (torch names bytes)."""
    size = match[1] or match[2]
    number, _, unit = size.replace(",", "").partition(" ")
    return format_bytes(int(number)) if unit == "bytes" and number.isdecimal() else size


def _memory_left() -> str:
    """The free memory or the limit of the process, as a clause."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit >= 0:
        return f"the process may use {format_bytes(limit)} (ulimit -v)"
    free = available_bytes()
    return "the system does not report what is free" if free is None else f"{format_bytes(free)} are free"


def available_bytes() -> int | None:
    """The memory in bytes that this process could still allocate; None if the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except OSError:
        return None
    free = next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if free is None or limit < 0:
        return free
    return max(0, min(free, limit - pages * resource.getpagesize()))


def resident_bytes() -> int | None:
    """The memory in bytes that this process occupies now; None if the system does not report it."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    except OSError:
        return None


def format_bytes(count: int) -> str:
    """A size in decimal units, such as 1.5 MB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
