"""An emulated aarch64 machine: a cross-compiler, and QEMU to run what it makes."""

import os
import shutil
import subprocess
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from mpcompile.runtimes.native import build

COMPILER, EMULATOR, OBJDUMP = "aarch64-linux-gnu-g++", "qemu-aarch64", "aarch64-linux-gnu-objdump"
SYSROOT = Path("/usr/aarch64-linux-gnu")
SECONDS = 1800  # the programs take seconds; this ends one that hangs
# QEMU's processors -> the kernels that they run.
PROCESSORS = {
    "cortex-a57": "kernel_baseline int8_baseline",
    "neoverse-n1": "kernel_baseline int8_dotprod",
    "max": "kernel_baseline int8_i8mm",
}
CPUINFO = """processor\t: 0
Features\t: fp asimd asimdhp asimdrdm asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1

"""
WHEELS = Path(__file__).parents[3] / "build" / "arm"  # where `make test-arm` puts ONNX Runtime's


def missing() -> str | None:
    """Returns why no aarch64 program can be compiled and run here, or None."""
    absent = [program for program in (COMPILER, EMULATOR, OBJDUMP) if shutil.which(program) is None]
    absent += [] if SYSROOT.is_dir() else [str(SYSROOT)]
    if not absent:
        return None
    return f"{', '.join(absent)} not found: apt install g++-aarch64-linux-gnu qemu-user (Debian, Ubuntu)"


def objects(folder: Path, flags: Sequence[str] = ()) -> list[Path]:
    """Compiles the library's sources for aarch64 into a folder and returns the object files."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("CXX", COMPILER)
        return build.objects(folder, flags, machine="aarch64")


def compile_with(arguments: Sequence[str]) -> None:
    """Runs the cross-compiler. Raises BuildFailed with its output."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("CXX", COMPILER)
        build.run(arguments)


def onnxruntime(folder: Path) -> Path | None:
    """Unpacks ONNX Runtime's shared library for aarch64 into a folder. Returns it, or None if there is no wheel."""
    wheels = sorted(WHEELS.glob("onnxruntime-*aarch64.whl"))
    if not wheels:
        return None
    with zipfile.ZipFile(wheels[-1]) as wheel:
        [name] = [name for name in wheel.namelist() if "libonnxruntime.so" in name]
        (folder / "libonnxruntime.so.1").write_bytes(wheel.read(name))
    return folder / "libonnxruntime.so.1"


def with_cpuinfo(folder: Path) -> Path:
    """Returns a root whose /proc/cpuinfo is that of a Neoverse N1. ONNX Runtime crashes on that of an x86-64 host."""
    cpus = folder / "sys" / "devices" / "system" / "cpu"
    for path in (cpus, folder / "proc"):
        path.mkdir(parents=True)
    (folder / "lib").symlink_to(SYSROOT / "lib")
    (folder / "proc" / "cpuinfo").write_text(CPUINFO, encoding="utf-8")
    for name in ("possible", "present", "kernel_max"):
        (cpus / name).write_text("0\n", encoding="utf-8")
    return folder


def run(
    program: Path,
    *arguments: str,
    processor: str = "max",
    environment: Mapping[str, str] | None = None,
    root: Path = SYSROOT,
) -> subprocess.CompletedProcess[str]:
    """Runs an aarch64 program on an emulated processor."""
    command = [EMULATOR, "-cpu", processor, "-L", str(root), str(program), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=SECONDS, env=os.environ | dict(environment or {})
    )
