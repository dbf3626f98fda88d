"""Scarce resources for tests: limits of this process (setrlimit), and disks that fill up."""

import builtins
import errno
import io
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def limited(kind: int, limit: int) -> Iterator[None]:
    """Inside, this process may have so much."""
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


class Filling:
    """A file of which a write fails half way, as where the disk is full."""

    def __init__(self, file: Any, fails: bool) -> None:
        self._file, self._fails = file, fails

    def write(self, content: Any) -> Any:
        if not self._fails:
            return self._file.write(content)
        self._file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device", self._file.name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "Filling":
        return self

    def __exit__(self, *failure: object) -> None:
        self._file.close()


class Disk:
    """Counts the files that are written under a folder; the one of that number is not written whole."""

    def __init__(self, folder: Path, full_at: int, patched: pytest.MonkeyPatch) -> None:
        self.files: list[str] = []
        opened = io.open

        def counted(file: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
            handle = opened(file, mode, *more, **named)
            if not set(mode) & set("wax+") or not str(file).startswith(str(folder)):
                return handle
            self.files.append(Path(str(file)).name)
            return Filling(handle, len(self.files) == full_at)

        patched.setattr(builtins, "open", counted)
        patched.setattr(io, "open", counted)
