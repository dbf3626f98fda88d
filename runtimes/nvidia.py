"""Finds out in a subprocess whether an NVIDIA GPU can be used: TensorRT's runtime crashes without a driver."""

import json
import subprocess
import sys
from dataclasses import dataclass

PROBE = """
import ctypes, json
try:
    cuda = ctypes.CDLL("libcuda.so.1")
except OSError:
    print(json.dumps({"error": "no NVIDIA driver (libcuda.so.1) is installed"})); raise SystemExit
status = cuda.cuInit(0)
if status:
    print(json.dumps({"error": f"the NVIDIA driver does not start (CUDA error {status})"})); raise SystemExit
count = ctypes.c_int()
cuda.cuDeviceGetCount(ctypes.byref(count))
if not count.value:
    print(json.dumps({"error": "the NVIDIA driver finds no GPU"})); raise SystemExit
device, name, major, minor = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_int(), ctypes.c_int()
cuda.cuDeviceGet(ctypes.byref(device), 0)
cuda.cuDeviceGetName(name, 256, device)
cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
print(json.dumps({"name": name.value.decode(), "capability": [major.value, minor.value]}))
"""
PROBE_SECONDS = 60  # a driver needs some seconds to wake a GPU


@dataclass(frozen=True, slots=True)
class Gpu:
    """The first GPU: its name and compute capability."""

    name: str
    capability: tuple[int, int]

    @property
    def sm(self) -> str:
        """The capability as in file names, such as sm80."""
        return f"sm{self.capability[0]}{self.capability[1]}"


def import_failure(module: str) -> str | None:
    """Returns why a module does not import, in one line, or None. Tries it in a subprocess, because it may crash."""
    done = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True)
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def first_gpu() -> Gpu | str:
    """Returns the driver's first GPU, or why there is none."""
    try:
        done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=PROBE_SECONDS)
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return f"the NVIDIA driver does not answer within {PROBE_SECONDS} s"
    except ValueError:
        return f"the NVIDIA driver fails when it lists GPUs (exit code {done.returncode})"
    if "error" in answer:
        return str(answer["error"])
    major, minor = answer["capability"]
    return Gpu(answer["name"], (major, minor))
