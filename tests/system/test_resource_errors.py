"""Bad days: a full disk and too little memory are one line, and nothing half-written is left."""

import errno
import re
import resource
from pathlib import Path

import pytest
from scarce_resources import limited

from mpcompile.errors import PassError
from mpcompile.system.resource_errors import available_bytes, format_bytes, shortage

# ---- what is told of which error


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


TORCH = "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: not enough memory: you tried to allocate {} bytes."
FULL = OSError(errno.ENOSPC, "No space left on device", "/tmp/x")
QUOTA = OSError(errno.EDQUOT, "Disk quota exceeded")
RUST = RuntimeError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (FULL, "the disk is full: .* left under /tmp during write"),
        (QUOTA, "the disk is full: nothing is left during write, and more is needed"),
        (RUST, "free some space, or name a folder on another"),
        (OSError(errno.EFBIG, "File too large"), "a file grew too large during write: the file system allows no"),
        (MemoryError(), "memory ran out during write: more was needed, and .* are free; use fewer calibration images"),
        (MemoryError("Unable to allocate 1.50 GiB for an array with shape"), "1.50 GiB more were needed"),
        (RuntimeError(TORCH.format(123456789)), "memory ran out during write: 123.5 MB more were needed"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."), "of the GPU ran out during write"),
        (RuntimeError("std::bad_alloc"), "memory ran out"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory ran out"),
        (caused(PassError("nm-mask failed"), MemoryError()), "memory ran out"),
    ],
)  # fmt: skip
def test_what_is_told(error: BaseException, text: str) -> None:
    found = shortage(error, "write")
    assert found is not None
    assert re.search(text, found), found


def test_other_errors_are_none_of_it() -> None:
    for error in (OSError(errno.EACCES, "Permission denied"), ValueError("singular"), PassError("no layer takes 2:4")):
        assert shortage(error, "write") is None
    assert [format_bytes(n) for n in (12, 1_500, 2_000_000, 3_210_000_000)] == [
        "12 bytes",
        "1.5 kB",
        "2.0 MB",
        "3.2 GB",
    ]


def test_a_limit_on_the_process_counts_as_all_there_is() -> None:
    with limited(resource.RLIMIT_AS, 1 << 40):
        before = available_bytes()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    with limited(resource.RLIMIT_AS, pages * resource.getpagesize() + (64 << 20)):
        after = available_bytes()
    assert before is not None
    assert after is not None
    assert after <= 64 << 20 < before
    assert available_bytes()


# ---- a full disk


# ---- too little memory
