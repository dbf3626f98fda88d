"""`python -m mpcompile` runs the command `mpcompile`."""

from mpcompile.cli.entry_point import main

main()
