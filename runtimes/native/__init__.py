"""The CPU kernel for N:M weights: a custom operator of ONNX Runtime, in a shared library built with the package.

`library()` returns the path of the library, `missing()` the reason why it cannot be used. Importing this loads nothing.
"""

import ctypes
import functools
import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

from mpcompile.errors import RuntimeMissing
from mpcompile.runtimes.native.build import HERE, LIBRARY, unbuildable

BUILD_COMMAND = "python -m mpcompile.runtimes.native"
SELFTEST_SECONDS = 60


def library() -> Path | None:
    """Returns the shared library to register with ONNX Runtime, or None if `missing()` gives a reason."""
    return None if missing() else HERE / LIBRARY


def missing() -> str | None:
    """Returns why the kernel cannot be used here and what to do, in one sentence, or None.

    The library runs its self-test in a subprocess, once per process.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed: pip install onnxruntime (or mpcompile[gpu])"
    if not (HERE / LIBRARY).is_file():
        obstacle = unbuildable()
        if obstacle is None:
            return f"the N:M kernel is not built: {BUILD_COMMAND}"
        return f"the N:M kernel is not built, and {obstacle}; masked layers run as dense until it is: {BUILD_COMMAND}"
    return refused(HERE / LIBRARY)


def instruction_set() -> str:
    """Returns the float32 kernel's instruction set on this CPU: avx512, avx2 or baseline (SSE2; NEON on aarch64).

    Raises RuntimeMissing if the kernel cannot be used.
    """
    return _named("mpcompile_kernel").removeprefix("kernel_")


def int8_instruction_set() -> str:
    """Returns the int8 kernels' instruction set on this CPU: avx512vnni, avx2, i8mm, dotprod, or baseline (plain C++).

    Raises RuntimeMissing if the kernels cannot be used.
    """
    return _named("mpcompile_int8_kernel").removeprefix("int8_")


def _named(function: str) -> str:
    """Returns what a function of the library without arguments returns. Raises RuntimeMissing."""
    path = library()
    if path is None:
        raise RuntimeMissing(missing() or "the N:M kernel is missing")
    call = getattr(ctypes.CDLL(str(path)), function)
    call.restype = ctypes.c_char_p
    return str(call().decode())


@functools.cache
def refused(path: Path) -> str | None:
    """Returns why a library fails its self-test with the installed ONNX Runtime, or None.

    The self-test may crash, so it runs in a subprocess.
    """
    command = [sys.executable, "-P", str(HERE / "selftest.py"), str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SELFTEST_SECONDS)
    except subprocess.TimeoutExpired:
        failure = f"it hung for {SELFTEST_SECONDS} s"
    else:
        if done.returncode == 0:
            return None
        failure = f"it crashed with signal {-done.returncode}" if done.returncode < 0 else _last_line(done.stderr)
    return (
        f"the N:M kernel {path.name} fails its self-test with onnxruntime {_onnxruntime_version()} ({failure}); "
        f"rebuild it with {BUILD_COMMAND}, or report this"
    )


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]


def _onnxruntime_version() -> str:
    """Returns the installed version from package metadata, which is faster than importing onnxruntime."""
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of unknown version"
