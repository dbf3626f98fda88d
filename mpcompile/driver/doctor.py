"""`mpcompile doctor`: what works on this machine, what is missing, and how to install it."""

import importlib.metadata
import platform
from dataclasses import dataclass
from fractions import Fraction

from mpcompile.driver.run_plan import Known, known
from mpcompile.ir.pattern_choice import patterns_in
from mpcompile.ir.precision import PRECISIONS
from mpcompile.runtimes import choice_at
from mpcompile.system.hardware import cpuinfo

VECTOR_FLAGS = (
    "avx2",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
)
LIBRARIES = ("torch", "torchvision", "timm", "onnx", "onnxscript", "onnx-ir", "numpy", "scipy", "safetensors")


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check. `remedy` says what to do if it does not work."""

    what: str
    works: bool
    found: str
    remedy: str = ""


def examine() -> list[Finding]:
    """One finding for each of: Python, libraries, targets, processor, GPU, and the passes of installed packages."""
    offered = known()
    return [
        Finding("python", True, platform.python_version()),
        *(_library(name) for name in LIBRARIES),
        *_targets(offered),
        _processor(),
        _gpu(),
        *_installed_passes(offered),
    ]


def _library(name: str) -> Finding:
    try:
        return Finding(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, False, "not installed", f"pip install {name}")


def _installed_passes(offered: Known) -> list[Finding]:
    """The passes of installed packages with their origin, and the entry points that cannot be used."""
    passes = [Finding(what, True, origin) for what, origin in offered.origins.items() if what.startswith("pass ")]
    remedy = "repair or uninstall that package; everything else works"
    return [*passes, *(Finding("entry point", False, sentence, remedy) for sentence in offered.broken)]


def _targets(offered: Known) -> list[Finding]:
    """One finding for each target. A runtime of an installed package that raises does not stop the others."""
    findings = []
    for name in offered.runtimes:
        origin = offered.origins.get(f"target {name}")
        try:
            findings.append(_target(name, offered))
        except Exception as error:
            if origin is None:
                raise
            failure = f"its checks fail with {type(error).__name__}: {error}"
            findings.append(Finding(f"target {name}", False, failure, f"repair or uninstall {origin}"))
    return findings


def _target(name: str, offered: Known) -> Finding:
    runtime, origin = offered.runtimes[name], offered.origins.get(f"target {name}")
    if missing := runtime.missing():
        effect = "no engine can be built; files are checked" if runtime.offline else "not available"
        return Finding(f"target {name}", False, effect, missing)
    versions = ", ".join(f"{library} {version}" for library, version in runtime.versions().items())
    source = f"; from {origin}" if origin else ""
    precisions = ", ".join(one for one in PRECISIONS if runtime.refuses(one, None) is None)
    half = " or ".join(map(str, patterns_in(choice_at(runtime, Fraction(1, 2), "fp32"))))
    kernels = f"patterns with kernels: {runtime.kernels()}; --pattern 50% is {half}"
    found = f"{versions}; {kernels}; precisions: {precisions}{source}"
    return Finding(f"target {name}", True, found)


def _processor() -> Finding:
    """The vector instructions that the speed of a CPU target depends on."""
    flags = next(iter(cpuinfo("flags") or cpuinfo("Features")), "").split()
    vector = [flag for flag in VECTOR_FLAGS if flag in flags]
    return Finding("processor", True, f"{platform.machine()}: {', '.join(vector) or 'vector instructions unknown'}")


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("NVIDIA GPU", False, "none that torch can use", "not needed for the targets above")
    major, minor = torch.cuda.get_device_capability()
    return Finding("NVIDIA GPU", True, f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}")
