"""A full disk and a lack of memory, told in one line: what was found, what was needed, what to do.

Libraries report both in ways of their own: an OSError with one of several numbers, a MemoryError, a RuntimeError of
torch or ONNX Runtime, an error of a library written in Rust. They are known by number, type or text, anywhere in the
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
def explained(during: Callable[[], str], folder: Path, needed_bytes: Callable[[], int | None]) -> Iterator[None]:
    """Inside, an error that comes of a full disk or of too little memory becomes a ResourceError.

    `during` says what was being done, `folder` is where the output is written, which takes about `needed_bytes`.
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
    """What lacked, where an error comes of a full disk or of too little memory; else None."""
    for cause in _chain(error):
        text = (
            "" if isinstance(cause, MpcompileError) else str(cause).lower()
        )  # ours have what they quote as their cause
        if isinstance(cause, OSError) and cause.errno == errno.EFBIG:
            limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
            found = f"files may have {spelt_bytes(limit)} (ulimit -f)" if limit >= 0 else "the disk takes no larger one"
            return f"a file grew too large during {during}: {found}; raise that limit, or name another --output"
        if (isinstance(cause, OSError) and cause.errno in FULL) or any(part in text for part in FULL_TEXTS):
            place = Path(str(cause.filename)) if isinstance(cause, OSError) and cause.filename else folder
            needed = f"the whole output takes about {spelt_bytes(needed_bytes)}" if needed_bytes else "more is needed"
            return (
                f"the disk is full: {_free_at(place)} during {during}, and {needed}; free some space, or name a folder "
                "on another disk with --output"
            )
        out_of_memory = isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno == errno.ENOMEM)
        if out_of_memory or any(part in text for part in MEMORY_TEXTS):
            found_size = ASKED.search(str(cause))
            asked = f"{_size(found_size)} more were needed" if found_size else "more was needed"
            return (
                f"memory ran out during {during}: {asked}, and {_memory_left()}; give fewer images (--calibration), "
                "a smaller batch, or the process more memory"
            )
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came of."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _free_at(place: Path | None) -> str:
    """How much is free on the disk of a file or folder."""
    known = next((path for path in (place, *place.parents) if path.is_dir()), None) if place else None
    return f"{spelt_bytes(shutil.disk_usage(known).free)} are left under {known}" if known else "nothing is left"


def _size(match: re.Match[str]) -> str:
    """The size that an allocator names; torch does so in bytes."""
    size = match[1] or match[2]
    number, _, unit = size.replace(",", "").partition(" ")
    return spelt_bytes(int(number)) if unit == "bytes" and number.isdecimal() else size


def _memory_left() -> str:
    """What there is, or how far the process may grow."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit >= 0:
        return f"the process may use {spelt_bytes(limit)} (ulimit -v)"
    free = available_bytes()
    return "there is no more" if free is None else f"{spelt_bytes(free)} are free"


def available_bytes() -> int | None:
    """The memory that this process could get, or None where the system does not tell."""
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


def spelt_bytes(count: int) -> str:
    """A size for people, in decimal units as disks are sold and files are listed."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
