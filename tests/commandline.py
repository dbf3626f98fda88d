"""Runs the command `mpcompile` in a test: in this process, since a new process takes seconds to import torch."""

import contextlib
import io
import logging
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from mpcompile.cli.entry_point import main

# A recipe that measures as little as possible.
QUICK = "bench: {batches: [1], seconds: 0.05, threads: 1}\ndata: {held_out: 64}\n"


def mpcompile(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs `mpcompile` with these arguments in this process; returns the exit code and both output streams."""
    line, code = ["mpcompile", *map(str, words)], 0
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        contextlib.chdir(cwd or Path.cwd()),
        mock.patch.object(sys, "argv", line),
        restored_settings(),
    ):
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return subprocess.CompletedProcess(line, code, out.getvalue(), err.getvalue())


def in_a_process(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs `python -m mpcompile` in a new process; returns the exit code and both output streams."""
    command = [sys.executable, "-m", "mpcompile", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, timeout=300)


def refused(done: subprocess.CompletedProcess[str], code: int, text: str) -> None:
    """Asserts that the command failed with this exit code and one line on standard error that contains the text.

    Standard output is empty, and there is no traceback.
    """
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("[")]  # progress
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("mpcompile: ")
    assert text in lines[0]


def stages_in(progress: str) -> list[str]:
    """The stages that the lines of progress tell of; a long stage has several lines."""
    return list(dict.fromkeys(line.split("] ")[1].split(", after ")[0] for line in progress.splitlines()))


@contextlib.contextmanager
def restored_settings() -> Iterator[None]:
    """Restores the signal handler and the loggers that a command changes."""
    loggers = [logging.getLogger(name) for name in ("mpcompile", "torch")]
    before = [(logger, logger.handlers[:], logger.level) for logger in loggers]
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
        for logger, handlers, level in before:
            logger.handlers[:] = handlers
            logger.setLevel(level)
