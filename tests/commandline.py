"""The command `mpcompile` as a test calls it: in this process, since importing torch anew takes seconds each time."""

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


def mpcompile(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The exit code and what was written to both streams."""
    line, code = ["mpcompile", *map(str, words)], 0
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        contextlib.chdir(cwd or Path.cwd()),
        mock.patch.object(sys, "argv", line),
        _as_it_was(),
    ):
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return subprocess.CompletedProcess(line, code, out.getvalue(), err.getvalue())


def in_a_process(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The same, of `python -m mpcompile`."""
    command = [sys.executable, "-m", "mpcompile", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, timeout=300)


@contextlib.contextmanager
def _as_it_was() -> Iterator[None]:
    """Afterwards, what a command sets for its process is as it was."""
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
