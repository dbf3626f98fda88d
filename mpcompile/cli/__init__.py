"""The command line: text -> values -> a front door -> a table. It holds no logic of its own."""

from mpcompile.cli.entry_point import main

__all__ = ["main"]
