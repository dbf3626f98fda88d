"""Builds the library where the package lies: `python -m mpcompile.runtimes.native`.

With `--widest avx2` it has no kernel for AVX-512: to test what runs on processors without it.
"""

import argparse
import sys

from mpcompile.runtimes.native.build import BuildFailed, build, instruction_sets

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m mpcompile.runtimes.native", description="Builds the CPU kernel.")
    parser.add_argument("--widest", choices=instruction_sets(), help="the widest instruction set to build for")
    try:
        print(build(widest=parser.parse_args().widest))
    except BuildFailed as error:
        sys.exit(str(error))
