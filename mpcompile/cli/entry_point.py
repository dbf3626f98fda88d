"""The entry point of the command line: it turns each error into one line and an exit code."""

import errno
import signal
import sys

import typer

from mpcompile.cli import (  # noqa: F401 (each registers its commands, in this order)
    analyze_command,
    bench_command,
    compare_command,
    compile_command,
    explain_command,
    init_command,
    inspect_commands,
)
from mpcompile.cli.app import app, stopped_text
from mpcompile.errors import MpcompileError, ResourceError, UsageError, one_line
from mpcompile.system.resource_errors import shortage

# What the system says of a path that a user gave: it is too long, loops, leads through a file, or may not be used.
PATH_ERRORS = (
    errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS,
)  # fmt: skip


class Terminated(SystemExit):
    """Raised on SIGTERM. It unwinds the stack, which removes the half-written folder."""


def _stop(signum: int, frame: object) -> None:
    raise Terminated(128 + signum)


def main() -> None:
    """Runs the command line. An error is printed as one line on standard error and sets the exit code."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        app()
    except MpcompileError as error:
        typer.echo(f"mpcompile: {one_line(error)}", err=True)
        raise SystemExit(error.exit_code) from None
    except Terminated as error:
        typer.echo(f"mpcompile: {stopped_text('SIGTERM', error)}", err=True)
        raise
    except Exception as error:
        if found := shortage(error, "the command"):
            typer.echo(f"mpcompile: {found}", err=True)
            raise SystemExit(ResourceError.exit_code) from None
        if isinstance(error, OSError) and error.errno in PATH_ERRORS and error.filename is not None:
            refused = UsageError(f"{error.filename} cannot be used: {error.strerror}; give another path")
            typer.echo(f"mpcompile: {one_line(refused)}", err=True)
            raise SystemExit(refused.exit_code) from None
        if {"-v", "-vv", "--verbose"} & set(sys.argv):
            raise
        text = f"unexpected {type(error).__name__}: {one_line(error)}"
        typer.echo(f"mpcompile: {text} (run it again with -v for the traceback, and please report it)", err=True)
        raise SystemExit(1) from None
