"""The hardware that runs this: names for reports, and the load and clocks while something is timed."""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def environment(versions: Mapping[str, str], device: str) -> dict[str, str]:
    """What the numbers were measured on."""
    return {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "device": device,
        **versions,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


BUSY = 0.5  # of the cores, before the first call
SLOWED = 0.9  # of the clock at the start
# Names of NVML's bits for what holds a GPU's clocks back, but for idling and settings that the user made.
THROTTLES = (
    "SwPowerCap",
    "HwSlowdown",
    "SyncBoost",
    "SwThermalSlowdown",
    "HwThermalSlowdown",
    "HwPowerBrakeSlowdown",
)


@dataclass(frozen=True, slots=True)
class Condition:
    """One look at the machine; None where it does not tell."""

    load: float | None  # processes that run or wait, mean of a minute
    mhz: float | None  # of the processor, mean over cores
    gpu_mhz: int | None
    gpu_celsius: int | None
    throttles: tuple[str, ...]


def condition(gpu: bool = False) -> Condition:
    """What the machine is like now."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    mhz, celsius, throttles = _gpu() if gpu else (None, None, ())
    return Condition(load, _processor_mhz(), mhz, celsius, throttles)


def disturbances(before: Condition, after: Condition) -> tuple[str, ...]:
    """What may have changed the times, in sentences; nothing where nothing was seen."""
    found = []
    cores = os.cpu_count() or 1
    if before.load is not None and before.load > BUSY * cores:
        found.append(f"in the minute before, {before.load:.1f} processes ran on {cores} cores, this one among them")
    for what, first, last in (("processor", before.mhz, after.mhz), ("GPU", before.gpu_mhz, after.gpu_mhz)):
        if first and last and last < SLOWED * first:
            found.append(f"the {what}'s clock fell from {first:.0f} to {last:.0f} MHz")
    throttles = sorted({*before.throttles, *after.throttles})
    if throttles:
        found.append(f"the GPU held its clock back: {', '.join(throttles)}")
    return tuple(found)


def _processor_mhz() -> float | None:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return None
    rates = [float(line.partition(":")[2]) for line in info.read_text().splitlines() if line.startswith("cpu MHz")]
    return sum(rates) / len(rates) if rates else None


def _gpu() -> tuple[int | None, int | None, tuple[str, ...]]:
    """Clock, temperature and what throttles the first GPU, from NVML where it is there."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # not installed, or no driver: either way it does not tell
        return None, None, ()
    try:
        device = pynvml.nvmlDeviceGetHandleByUUID(_uuid())
        mhz = int(pynvml.nvmlDeviceGetClockInfo(device, pynvml.NVML_CLOCK_SM))
        celsius = int(pynvml.nvmlDeviceGetTemperature(device, pynvml.NVML_TEMPERATURE_GPU))
        return mhz, celsius, _throttles(pynvml, pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(device))
    except Exception:  # another NVML, or a GPU in parts: it does not tell
        return None, None, ()
    finally:
        pynvml.nvmlShutdown()


def _uuid() -> str:
    """The name under which NVML knows the GPU that PyTorch calls the first: the two count in different orders."""
    import torch

    return f"GPU-{torch.cuda.get_device_properties(0).uuid}"


def _throttles(pynvml: Any, bits: int) -> tuple[str, ...]:
    """The names of the bits that are set."""
    known = ((name, getattr(pynvml, f"nvmlClocksThrottleReason{name}", 0)) for name in THROTTLES)
    return tuple(name for name, bit in known if bits & bit)
