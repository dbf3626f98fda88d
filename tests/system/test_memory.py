"""The memory limit, what is left of it, and the peak of the process."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mpcompile.system.memory as memory_module
from mpcompile.cli import parse
from mpcompile.errors import UsageError
from mpcompile.system.device import CPU
from mpcompile.system.memory import SHARE, memory_limit, peak_bytes, release_freed, spill_folder, unused_bytes
from mpcompile.system.resource_errors import resident_bytes

GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None),
        ("4GiB", 4 * GIB),
        ("4 gib", 4 * GIB),
        ("1.5GB", 1_500_000_000),
        ("800MB", 800_000_000),
        ("64KiB", 65536),
        ("1TB", 10**12),
    ],
)
def test_sizes_are_read(text: str | None, expected: int | None) -> None:
    assert parse.memory(text) == expected


@pytest.mark.parametrize("text", ["", "4", "4G", "0GB", "-1GB", "GB", "1e3MB", "4GiB4", "٤GB"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no size; give a number with its unit, such as 4GiB"):
        parse.memory(text)


def test_what_is_left_of_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "available_bytes", lambda: 8 * GIB)
    monkeypatch.setattr(memory_module, "resident_bytes", lambda: 1 * GIB)
    assert unused_bytes(CPU) == SHARE * 8 * GIB
    with memory_limit(3 * GIB):
        assert unused_bytes(CPU) == 2 * GIB
        with memory_limit(GIB // 2):
            assert unused_bytes(CPU) == 0  # the process is beyond it already
        assert unused_bytes(CPU) == 2 * GIB
    with memory_limit(64 * GIB):
        assert unused_bytes(CPU) == 8 * GIB  # not more than is free
    monkeypatch.setattr(memory_module, "available_bytes", lambda: None)
    assert unused_bytes(CPU) is None


def test_files_go_to_the_folder_of_the_run(tmp_path: Path) -> None:
    with memory_limit(None, tmp_path / "work"):
        assert spill_folder() == tmp_path / "work"
        assert spill_folder().is_dir()
    assert spill_folder().is_dir()


PEAKS = """
from mpcompile.system.memory import begin_peak, peak_bytes
import numpy as np

begin_peak()
before = peak_bytes()
values = np.ones(200_000_000 // 8)
during = peak_bytes()
del values
begin_peak()
print(before, during, peak_bytes())
"""


def test_a_peak_is_that_of_its_own_part() -> None:
    if peak_bytes() is None:
        pytest.skip("the system does not report the peak memory of a process")
    # A process of its own: in this one, other tests may have left memory that is used again.
    done = subprocess.run([sys.executable, "-c", PEAKS], check=True, capture_output=True, text=True)
    before, during, after = map(int, done.stdout.split())
    assert during - before > 150_000_000
    assert during - after > 150_000_000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc, whose allocator keeps freed memory")
def test_freed_memory_goes_back_to_the_system() -> None:
    blocks = [torch.ones(16_384) for _ in range(3_200)]  # 64 KiB each, less than what is mapped on its own
    last = blocks[-1]
    before = resident_bytes()
    del blocks
    release_freed()
    after = resident_bytes()
    assert before is not None
    assert after is not None
    assert before - after > 150_000_000  # of 210 MB; `last` lies above what was freed
    assert last.numel() == 16_384
