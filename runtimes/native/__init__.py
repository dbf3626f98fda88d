"""The CPU kernel for N:M weights: an operator of ONNX Runtime in a shared library that is built with the package.

`missing()` says why it cannot be used here, `library()` where it is. Nothing is loaded or tried before it is asked for.
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
TRIAL_SECONDS = 60


def library() -> Path | None:
    """The shared library to register with ONNX Runtime, or None where `missing()` has something to say."""
    return None if missing() else HERE / LIBRARY


def missing() -> str | None:
    """Why the kernel cannot be used here and what to do, as one sentence, or None. Tried once in a process's life."""
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed: pip install onnxruntime (or mpcompile[gpu])"
    if not (HERE / LIBRARY).is_file():
        why = unbuildable()
        if why is None:
            return f"the N:M kernel is not built: {BUILD_COMMAND}"
        return f"the N:M kernel is not built, and {why}; masked layers run as dense until it is: {BUILD_COMMAND}"
    return refused(HERE / LIBRARY)


def instruction_set() -> str:
    """What the kernel runs on here: avx512, avx2 or baseline (SSE2; NEON on aarch64). Raises RuntimeMissing."""
    found = library()
    if found is None:
        raise RuntimeMissing(missing() or "the N:M kernel is missing")
    name = ctypes.CDLL(str(found)).mpcompile_kernel
    name.restype = ctypes.c_char_p
    return str(name().decode()).removeprefix("kernel_")


@functools.cache
def refused(path: Path) -> str | None:
    """Why a library does not work with the installed ONNX Runtime, or None: tried on a tiny model, in a process."""
    command = [sys.executable, "-P", str(HERE / "selftest.py"), str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TRIAL_SECONDS)
    except subprocess.TimeoutExpired:
        found = f"it hung for {TRIAL_SECONDS} s"
    else:
        if done.returncode == 0:
            return None
        found = f"it crashed with signal {-done.returncode}" if done.returncode < 0 else _last_line(done.stderr)
    return (
        f"the N:M kernel {path.name} fails its self-test with onnxruntime {_onnxruntime_version()} ({found}); build it "
        f"anew with {BUILD_COMMAND}, or report this"
    )


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]


def _onnxruntime_version() -> str:
    """It comes as onnxruntime or as onnxruntime-gpu; importing it takes longer than asking."""
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of unknown version"
