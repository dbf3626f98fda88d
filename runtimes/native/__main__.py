"""Builds the library where the package lies: `python -m mpcompile.runtimes.native`."""

import sys

from mpcompile.runtimes.native.build import BuildFailed, build

if __name__ == "__main__":
    try:
        print(build())
    except BuildFailed as error:
        sys.exit(str(error))
