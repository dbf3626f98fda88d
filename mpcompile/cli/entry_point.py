"""The entry point of the command line: exit codes, and one line for each failure."""

import signal
import sys

import typer

from mpcompile.cli import analyze_command, bench_command, compile_command, inspect_commands  # noqa: F401
from mpcompile.cli.app import app
from mpcompile.errors import MpcompileError, ResourceError, one_line
from mpcompile.system.resource_errors import shortage


def _stop(signum: int, frame: object) -> None:
    raise SystemExit(128 + signum)  # unwinds, so that the half-written folder is removed


def main() -> None:
    """Runs the command; a failure is one line on standard error and an exit code."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        app()
    except MpcompileError as error:
        typer.echo(f"mpcompile: {one_line(error)}", err=True)
        raise SystemExit(error.exit_code) from None
    except Exception as error:
        if found := shortage(error, "the command"):
            typer.echo(f"mpcompile: {found}", err=True)
            raise SystemExit(ResourceError.exit_code) from None
        if {"-v", "-vv", "--verbose"} & set(sys.argv):
            raise
        text = f"unforeseen {type(error).__name__}: {one_line(error)}"
        typer.echo(f"mpcompile: {text} (-v shows where; please report it)", err=True)
        raise SystemExit(1) from None
