"""The inner loops of our microkernels, and llvm-mca's estimate of their cycles on a processor."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from lib.common import ROOT
from mpcompile.runtimes.native import build

sys.path.append(str(ROOT / "tests" / "runtimes" / "native"))
from inner_loops import AARCH64, X86_64, Loop, Machine, disassembled, innermost_loops

ITERATIONS = 200
ESTIMATORS = ("llvm-mca-22", "llvm-mca-21", "llvm-mca-20", "llvm-mca-19", "llvm-mca")  # newer ones know more
# Products of one instruction: of 8 bits, then of float32 lanes.
MULTIPLIES = {
    "vpdpbusd": {"zmm": 64}, "vpmaddubsw": {"ymm": 32}, "sdot": {"": 16}, "usdot": {"": 16}, "sudot": {"": 16},
    "usmmla": {"": 32}, "fmla": {"": 4}, "vfmadd": {"zmm": 16, "ymm": 8, "xmm": 4},
}  # fmt: skip
JUMP = re.compile(r"^(?P<jump>j\w+|b\.\w+|cbn?z\s+\w+,)\s+[0-9a-f]+\b.*")


@dataclass(frozen=True, slots=True)
class Family:
    """A CPU family: how its code reads, the compiler for it, and its name for llvm-mca."""

    machine: Machine
    name: str
    compiler: str
    triple: str


FAMILIES = {
    "x86": Family(X86_64, "x86_64", "g++", "x86_64-linux-gnu"),
    "arm": Family(AARCH64, "aarch64", "aarch64-linux-gnu-g++", "aarch64-linux-gnu"),
}


def estimator() -> str:
    """Returns the newest llvm-mca on the PATH. Raises SystemExit if there is none."""
    found = next((name for name in ESTIMATORS if shutil.which(name)), None)
    if found is None:
        raise SystemExit("no llvm-mca was found: apt install llvm-22 (Debian, Ubuntu)")
    return found


def compiled(family: Family, folder: Path) -> list[Path]:
    """Compiles the library's sources for a CPU family into a folder and returns the object files."""
    if shutil.which(family.compiler) is None:
        raise SystemExit(f"{family.compiler} was not found: apt install {family.compiler}")
    folder.mkdir()
    with mock.patch.dict(os.environ, CXX=family.compiler):
        return build.objects(folder, machine=family.name)


def products(text: str) -> int:
    """Returns the products of one instruction, or 0."""
    operation = text.split()[0]
    for start, by_register in MULTIPLIES.items():
        if operation == start or (start == "vfmadd" and operation.startswith(start)):
            return next((count for register, count in by_register.items() if register in text), 0)
    return 0


def loops_of(file: Path, function: str, machine: Machine) -> list[Loop]:
    """Returns the innermost loops of a function, those with the most products first."""
    loops = innermost_loops(disassembled(file, machine), function, machine)
    return sorted(loops, key=lambda loop: -products_of(loop.instructions))


def selects_columns(loop: Loop) -> int:
    """Returns how many column indices one pass of a float32 loop reads."""
    return sum(text.startswith(("movzw", "ldrh", "ldurh")) for text in loop.instructions)


def products_of(instructions: Sequence[str]) -> int:
    """Returns the products of one pass of a loop."""
    return sum(products(text) for text in instructions)


def cycles(instructions: Sequence[str], family: Family, processor: str) -> float:
    """Returns llvm-mca's estimate of the cycles that one pass of a loop takes, with all data in the L1 cache."""
    comment = r"\s*(//| <).*" if family.machine is AARCH64 else r"\s*(#| <).*"
    lines = [JUMP.sub(r"\g<jump> .Lstart", re.sub(comment, "", text)) for text in instructions]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "loop.s"
        source.write_text("\n".join([".Lstart:", *lines, ""]), encoding="utf-8")
        features = ["-mattr=+dotprod,+i8mm"] if family.machine is AARCH64 else []
        command = [
            estimator(), f"-mtriple={family.triple}", f"-mcpu={processor}", *features, f"-iterations={ITERATIONS}",
            "--json", str(source),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"llvm-mca: {done.stderr[-2000:]}")
    summary = json.loads(done.stdout)["CodeRegions"][0]["SummaryView"]
    return float(summary["TotalCycles"]) / ITERATIONS
