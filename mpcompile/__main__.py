"""`python -m mpcompile` is the command `mpcompile`."""

from mpcompile.cli.entry_point import main

main()
