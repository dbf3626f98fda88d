"""Builds the kernel's library inside the package: `python -m mpcompile.runtimes.native`.

`--widest avx2` leaves the AVX-512 kernel out, to test the kernel of CPUs without AVX-512.
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
