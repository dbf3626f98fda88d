"""Builds the kernel's shared library from `src/`, for setup.py and `python -m mpcompile.runtimes.native`.

Imports only the standard library, because setup.py runs this before anything is installed. The kernel is compiled once
per instruction set of the CPU family; the library selects one at run time.
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
SHARED = (
    "skinny_packing.cpp", "tile_scheduler.cpp", "conv_scheduler.cpp", "int8_packing.cpp", "int8_baseline.cpp",
    "cpu_dispatch.cpp", "ort_values.cpp", "ort_weights.cpp", "ort_operator.cpp", "ort_conv.cpp", "ort_int8_gemm.cpp",
    "ort_int8_conv.cpp", "int8_conv.cpp", "ort_int8_pool.cpp", "ort_int8_fusions.cpp", "ort_register.cpp",
)  # fmt: skip
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi")
# nodelete: thread-local memory in ONNX Runtime's threads is freed by code of this library, so it must stay loaded.
LINK = {"Linux": ("-shared", "-Wl,-z,nodelete", "-Wl,--no-undefined", "-s"), "Darwin": ("-dynamiclib",)}
INTERFACE = ("RegisterCustomOps", "mpcompile_kernel", "mpcompile_int8_kernel")
KERNELS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "avx512": ("-mavx512f", "-mavx512vl", "-mavx512dq", "-mfma", "-mprfchw", "-mprefer-vector-width=512"),
        "avx2": ("-mavx2", "-mfma", "-mprfchw"),
        "baseline": (),
    },
    # GCC 12 schedules loads so early that sums do not fit the registers; on x86-64 it does not schedule before it
    # allocates registers. Clang ignores the option. On ARM the baseline has NEON.
    "aarch64": {"baseline": ("-fno-schedule-insns",)},
}
# Of the int8 kernels. They belong to the set of KERNELS on the right: without it they are not built either.
ARM_INT8_KERNELS: dict[str, tuple[tuple[str, ...], str]] = {
    "i8mm": (("-march=armv8.2-a+dotprod+i8mm",), "baseline"),
    "dotprod": (("-march=armv8.2-a+dotprod",), "baseline"),
}
INT8_KERNELS: dict[str, dict[str, tuple[tuple[str, ...], str]]] = {
    "x86_64": {
        "avx512vnni": (("-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mavx512vnni", "-mfma"), "avx512"),
        "avx2": (("-mavx2", "-mfma"), "avx2"),
    },
    "aarch64": ARM_INT8_KERNELS,
    "arm64": ARM_INT8_KERNELS,  # aarch64, as macOS names it
}
# The sources of the int8 kernels; on ARM, attention runs on the baseline kernel.
INT8_PARTS = {"x86_64": ("int8_gemm", "attention", "layer_norm")}
OTHER_INT8_PARTS = ("int8_gemm", "layer_norm")
OTHER_CPUS: dict[str, tuple[str, ...]] = {"baseline": ()}


class BuildFailed(Exception):
    """The library was not built. The text is the compiler's output, or why this machine cannot compile it."""


def compiler() -> list[str] | None:
    """Returns the command of the C++ compiler: $CXX split like a shell command, or the first on the PATH; else None."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        return named if shutil.which(named[0]) else None
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def unbuildable() -> str | None:
    """Returns why the library cannot be built on this machine, or None."""
    if platform.system() not in SYSTEMS:
        return f"the N:M kernel is built on Linux and macOS, not on {platform.system()}"
    if compiler() is None:
        install = "xcode-select --install" if platform.system() == "Darwin" else "apt install g++"
        return f"no C++17 compiler was found (c++, g++, clang++ or $CXX): {install}"
    return None


def instruction_sets(machine: str | None = None) -> list[str]:
    """Returns the instruction sets that the kernel can be compiled for on a CPU family, widest first.

    `machine` is the family's name from platform.machine(); by default that of this machine.
    """
    return list(KERNELS.get(machine or platform.machine(), OTHER_CPUS))


def objects(
    folder: Path, extra: Sequence[str] = (), widest: str | None = None, machine: str | None = None
) -> list[Path]:
    """Compiles all sources of the library into a folder and returns the object files. Raises BuildFailed.

    The kernel is compiled for every instruction set, or for `widest` and the narrower ones. `extra` are compiler flags.
    `machine` is the CPU family that $CXX compiles for, if it is a cross-compiler.
    """
    compiled = []
    machine = machine or platform.machine()
    available = KERNELS.get(machine, OTHER_CPUS)
    selected = instruction_sets(machine)
    if widest is not None:
        if widest not in selected:
            raise BuildFailed(f"{widest!r} is not an instruction set of {machine}; choose one of {', '.join(selected)}")
        selected = selected[selected.index(widest) :]
    kernels = {name: available[name] for name in selected}
    names = ("kernel", "skinny", "conv")
    jobs = [
        (f"{part}.cpp", f"{part}_{name}", (*flags, *(f"-DNM_{kind.upper()}={kind}_{name}" for kind in names)))
        for name, flags in kernels.items()
        for part in ("nm_gemm", "nm_gemm_skinny", "nm_conv")
    ]
    int8 = {name: flags for name, (flags, needs) in INT8_KERNELS.get(machine, {}).items() if needs in kernels}
    jobs += [
        (f"{part}.cpp", f"{part}_{name}", (*flags, f"-DNM_{part.upper()}={part}_{name}"))
        for name, flags in int8.items()
        for part in INT8_PARTS.get(machine, OTHER_INT8_PARTS)
    ]
    # cpu_dispatch.cpp selects among these
    macros = (*(f"-DNM_HAS_{name}" for name in kernels), *(f"-DNM_HAS_INT8_{name}" for name in int8))
    jobs += [(source, Path(source).stem, macros) for source in SHARED]
    for source, name, flags in jobs:
        target = folder / f"{name}.o"
        run([*FLAGS, *flags, *extra, "-c", str(SOURCES / source), "-o", str(target)])
        compiled.append(target)
    return compiled


def run(arguments: Sequence[str]) -> None:
    """Runs the compiler with these arguments. Raises BuildFailed with the command and the compiler's output."""
    command = compiler()
    if command is None:
        raise BuildFailed(unbuildable())
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildFailed(f"{shlex.join([*command, *arguments])}\n{done.stderr.strip()}")


def build(target: Path = HERE / LIBRARY, widest: str | None = None) -> Path:
    """Builds the library, replaces `target` atomically and returns it. Raises BuildFailed.

    `widest` is the widest instruction set to compile the kernel for; by default all are compiled.
    """
    if obstacle := unbuildable():
        raise BuildFailed(obstacle)
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / LIBRARY
        link = [*LINK[platform.system()], _only_interface(Path(folder))]
        run([*link, *map(str, objects(Path(folder), widest=widest)), "-o", str(library)])
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{target.name}.{os.getpid()}")
        shutil.copyfile(library, temporary)
        temporary.replace(target)  # a process that has loaded the old library keeps it
    return target


def _only_interface(folder: Path) -> str:
    """Writes the list of exported symbols into a folder, and returns the linker's option for it.

    -fvisibility=hidden does not hide what the compiler instantiates from the standard library's templates. Exported,
    they could be replaced by those of another library of the process, which another compiler may have made.
    """
    listed = folder / "interface.txt"
    if platform.system() == "Darwin":
        listed.write_text("".join(f"_{name}\n" for name in INTERFACE), encoding="utf-8")
        return f"-Wl,-exported_symbols_list,{listed}"
    listed.write_text(f"{{ global: {' '.join(f'{name};' for name in INTERFACE)} local: *; }};\n", encoding="utf-8")
    return f"-Wl,--version-script={listed}"
