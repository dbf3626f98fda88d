"""`python -m mpcompile` is the command `mpcompile`."""

from mpcompile.cli.main import main

main()
