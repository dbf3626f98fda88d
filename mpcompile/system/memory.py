"""How much memory a run may use: the limit of `--memory`, and where what exceeds it is put.

The limit is on the resident memory of the process. `memory_limit` sets it for the current context (`contextvars`), as
mpcompile.system.progress does with its listener. Without it, three quarters of the free memory may be used.
"""

import ctypes
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch

from mpcompile.system.resource_errors import available_bytes, resident_bytes

SHARE = 0.75  # of the free memory, if no limit is given


@dataclass(frozen=True, slots=True)
class _Limit:
    limit_bytes: int | None
    folder: Path | None


NO_LIMIT = _Limit(None, None)
_current: ContextVar[_Limit] = ContextVar("memory", default=NO_LIMIT)


@contextmanager
def memory_limit(limit_bytes: int | None, folder: Path | None = None) -> Iterator[None]:
    """Within the block, passes keep the process within `limit_bytes` of memory and put the rest in `folder`.

    If the limit is None, it is three quarters of what is free where memory is needed; if the folder is None, files go
    to the system's folder for temporary files.
    """
    token = _current.set(_Limit(limit_bytes, folder))
    try:
        yield
    finally:
        _current.reset(token)


def unused_bytes(device: torch.device) -> int | None:
    """How much more memory of the device the run may use now; None if the system does not report it.

    `--memory` limits the memory of the process. A GPU's memory is limited to three quarters of what is free there.
    """
    if device.type == "cuda":
        return int(SHARE * torch.cuda.mem_get_info(device)[0])
    release_freed()
    free, given = available_bytes(), _current.get().limit_bytes
    if given is None:
        return None if free is None else int(SHARE * free)
    used = resident_bytes()
    if used is None:
        return given if free is None else min(given, free)
    return max(0, min(given - used, given if free is None else free))


def release_freed() -> None:
    """Gives memory that the process has freed back to the system, where glibc keeps it for later.

    glibc 2.36 finds few of the freed blocks again that are aligned, as torch's are: a process that runs EfficientNet
    on batches of 16 images grew by 64 MB a batch, to twice what it needs. A call takes a hundredth of such a batch.
    """
    with suppress(OSError, AttributeError):  # another C library has no such function
        ctypes.CDLL(None).malloc_trim(0)


def begin_peak() -> None:
    """Starts to measure the peak memory of this process anew, where the system allows it."""
    release_freed()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes() -> int | None:
    """The largest memory of this process since `begin_peak`, in bytes; None if the system does not report it."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


def spill_folder() -> Path:
    """An existing folder for files that hold what exceeds the limit."""
    folder = _current.get().folder
    if folder is None:
        return Path(tempfile.gettempdir())
    folder.mkdir(parents=True, exist_ok=True)
    return folder
