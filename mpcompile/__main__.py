"""`python -m mpcompile` is the command `mpcompile`."""

from mpcompile.cli import main

main()
