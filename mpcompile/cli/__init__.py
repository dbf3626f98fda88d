"""The command line: each command parses its options, calls one function of `mpcompile.driver` and prints the result."""

from mpcompile.cli.entry_point import main

__all__ = ["main"]
