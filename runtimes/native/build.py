"""The shared library, built from the sources beside this file: by setup.py, and where that was skipped by
`python -m mpcompile.runtimes.native`.

Only the standard library is used, and nothing of mpcompile: setup.py runs this before anything is installed. The
kernel is compiled once for every instruction set of the processor family; which one runs is decided when it runs.
"""

import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = HERE / "src"
LIBRARY = "libmpcompile_native.so"
SYSTEMS = ("Linux", "Darwin")
SHARED = ("skinny_packing.cpp", "tile_scheduler.cpp", "cpu_dispatch.cpp", "ort_operator.cpp")
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi")
# A library that a session uses must not be unloaded: memory of ONNX Runtime's threads is freed by its code.
LINK = {"Linux": ("-shared", "-Wl,-z,nodelete", "-Wl,--no-undefined", "-s"), "Darwin": ("-dynamiclib",)}
KERNELS = {
    "x86_64": {
        "avx512": ("-mavx512f", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"),
        "avx2": ("-mavx2", "-mfma"),
        "baseline": (),
    }
}
ELSEWHERE: dict[str, tuple[str, ...]] = {"baseline": ()}  # on aarch64 that is NEON


class BuildFailed(Exception):
    """The library was not built; the text is the compiler's, or why there was none to ask."""


def compiler() -> list[str] | None:
    """The command of a C++ compiler: $CXX as build tools read it, or the first that is found."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        return named if shutil.which(named[0]) else None
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def unbuildable() -> str | None:
    """Why no library can be built here, or None."""
    if platform.system() not in SYSTEMS:
        return f"the N:M kernel is built on Linux and macOS, not on {platform.system()}"
    if compiler() is None:
        install = "xcode-select --install" if platform.system() == "Darwin" else "apt install g++"
        return f"no C++17 compiler was found (c++, g++ or clang++, or what CXX names; {install})"
    return None


def instruction_sets() -> list[str]:
    """What the kernel can be compiled for on this processor family, widest first."""
    return list(KERNELS.get(platform.machine(), ELSEWHERE))


def objects(folder: Path, extra: Sequence[str] = (), widest: str | None = None) -> list[Path]:
    """The object files of everything but programs, compiled into a folder. Raises BuildFailed.

    The kernel is compiled for every instruction set, or from `widest` on for the narrower ones.
    """
    made = []
    every = KERNELS.get(platform.machine(), ELSEWHERE)
    chosen = instruction_sets()
    if widest is not None:
        if widest not in chosen:
            raise BuildFailed(f"{widest!r} is no instruction set of {platform.machine()}; give {', '.join(chosen)}")
        chosen = chosen[chosen.index(widest) :]
    kernels = {name: every[name] for name in chosen}
    jobs = [
        (f"{part}.cpp", f"{part}_{name}", (*flags, f"-DNM_KERNEL=kernel_{name}", f"-DNM_SKINNY=skinny_{name}"))
        for name, flags in kernels.items()
        for part in ("nm_gemm", "nm_gemm_skinny")
    ]
    there = tuple(f"-DNM_HAS_{name}" for name in kernels)  # for cpu_dispatch.cpp
    jobs += [(source, Path(source).stem, there) for source in SHARED]
    for source, name, flags in jobs:
        target = folder / f"{name}.o"
        run([*FLAGS, *flags, *extra, "-c", str(SOURCES / source), "-o", str(target)])
        made.append(target)
    return made


def run(arguments: Sequence[str]) -> None:
    """The compiler with these arguments. Raises BuildFailed with what it says."""
    command = compiler()
    if command is None:
        raise BuildFailed(unbuildable())
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildFailed(f"{shlex.join([*command, *arguments])}\n{done.stderr.strip()}")


def build(target: Path = HERE / LIBRARY, widest: str | None = None) -> Path:
    """The library, written to `target` in one step, with no wider instruction set than `widest`. Raises BuildFailed."""
    if why := unbuildable():
        raise BuildFailed(why)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / LIBRARY
        run([*LINK[platform.system()], *map(str, objects(Path(folder), widest=widest)), "-o", str(made)])
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f"{target.name}.{os.getpid()}")
        shutil.copyfile(made, beside)
        beside.replace(target)  # a process that has the old one loaded keeps it
    return target
