"""What works on this machine, what is missing, and how to get it."""

import importlib.metadata
import platform
from dataclasses import dataclass
from pathlib import Path

from mpcompile.driver.run_plan import Known, known

VECTOR_FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "sve")
LIBRARIES = ("torch", "torchvision", "timm", "onnx", "onnxscript", "onnx-ir", "numpy", "scipy", "safetensors")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `remedy` says what to do where it does not work."""

    what: str
    works: bool
    found: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Every finding: Python, libraries, targets, processor, GPU, and what others' packages offer."""
    found = known()
    return [
        Finding("python", True, platform.python_version()),
        *(_library(name) for name in LIBRARIES),
        *_targets(found),
        _processor(),
        _gpu(),
        *_offered(found),
    ]


def _library(name: str) -> Finding:
    try:
        return Finding(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, False, "not installed", f"pip install {name}")


def _offered(found: Known) -> list[Finding]:
    """Passes of others, whose they are, and entry points that cannot be used."""
    passes = [Finding(what, True, origin) for what, origin in found.origins.items() if what.startswith("pass ")]
    remedy = "mend or uninstall that package; everything else works"
    return [*passes, *(Finding("entry point", False, sentence, remedy) for sentence in found.broken)]


def _targets(found: Known) -> list[Finding]:
    findings = []
    for name in found.runtimes:
        origin = found.origins.get(f"target {name}")
        try:
            findings.append(_target(name, found))
        except Exception as error:
            if origin is None:
                raise
            told = f"it fails when it is asked: {type(error).__name__}: {error}"
            findings.append(Finding(f"target {name}", False, told, f"mend or uninstall {origin}"))
    return findings


def _target(name: str, found: Known) -> Finding:
    runtime, origin = found.runtimes[name], found.origins.get(f"target {name}")
    if missing := runtime.missing():
        told = "no engine can be built; files are checked" if runtime.offline else "not available"
        return Finding(f"target {name}", False, told, missing)
    versions = ", ".join(f"{library} {version}" for library, version in runtime.versions().items())
    whose = f"; from {origin}" if origin else ""
    return Finding(f"target {name}", True, f"{versions}; patterns with kernels: {runtime.kernels()}{whose}")


def _processor() -> Finding:
    """The vector instructions that decide how fast a CPU target is."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    flags = next(
        (line.partition(":")[2].split() for line in text.splitlines() if line.startswith(("flags", "Features"))), []
    )
    vector = [flag for flag in VECTOR_FLAGS if flag in flags]
    return Finding("processor", True, f"{platform.machine()}: {', '.join(vector) or 'vector instructions unknown'}")


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("NVIDIA GPU", False, "none that torch can use", "not needed for the targets above")
    major, minor = torch.cuda.get_device_capability()
    return Finding("NVIDIA GPU", True, f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}")
