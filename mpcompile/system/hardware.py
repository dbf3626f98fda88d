"""Hardware: its names for reports, and its load and clocks during a timing."""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CPUINFO = Path("/proc/cpuinfo")  # Linux only


def environment(versions: Mapping[str, str], device: str) -> dict[str, str]:
    """The environment of a measurement: processor, logical cores, system, Python, device and library versions.

    `versions` maps the name of a library to its version; `device` is the name of the device that ran the model.
    """
    return {
        "processor": processor_name(),
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "device": device,
        **versions,
    }


def processor_name() -> str:
    """The CPU's model name, or "unknown"."""
    return next(iter(cpuinfo("model name")), "") or platform.processor() or "unknown"


def cpuinfo(field: str, file: Path = CPUINFO) -> tuple[str, ...]:
    """The values of one field of /proc/cpuinfo, one for each logical CPU; empty if the file or the field is absent."""
    if not file.is_file():
        return ()
    lines = (line.partition(":") for line in file.read_text(encoding="utf-8").splitlines())
    return tuple(value.strip() for name, _, value in lines if name.strip() == field)


BUSY = 0.5  # load per core before the first call; above it, the machine counts as busy
SLOWED = 0.9  # share of the clock at the start; below it, the clock counts as throttled
# NVML's names of reasons why a GPU lowers its clocks, except idling and limits that the user set.
THROTTLES = (
    "SwPowerCap",
    "HwSlowdown",
    "SyncBoost",
    "SwThermalSlowdown",
    "HwThermalSlowdown",
    "HwPowerBrakeSlowdown",
)


@dataclass(frozen=True, slots=True)
class MachineState:
    """Load and clocks at one moment; None where the system does not report them."""

    load: float | None  # runnable processes, mean over one minute
    mhz: float | None  # clock of the processor, mean over cores
    gpu_mhz: int | None
    gpu_celsius: int | None
    throttles: tuple[str, ...]  # NVML's reasons for lower clocks, by the names in THROTTLES


def machine_state(gpu: bool = False) -> MachineState:
    """The load and clocks now; with `gpu`, those of the first GPU too."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    mhz, celsius, throttles = _gpu() if gpu else (None, None, ())
    return MachineState(load, _processor_mhz(), mhz, celsius, throttles)


def disturbances(before: MachineState, after: MachineState) -> tuple[str, ...]:
    """Conditions that may have distorted a timing, one sentence each; empty if none was observed.

    These are a load above BUSY before the timing, a clock that fell below SLOWED of its value before the timing, and
    throttle reasons of the GPU.
    """
    found = []
    cores = os.cpu_count() or 1
    if before.load is not None and before.load > BUSY * cores:
        found.append(
            f"in the minute before, {before.load:.1f} processes were running on {cores} cores on average, this one "
            "included"
        )
    for what, first, last in (("processor", before.mhz, after.mhz), ("GPU", before.gpu_mhz, after.gpu_mhz)):
        if first and last and last < SLOWED * first:
            found.append(f"the {what}'s clock fell from {first:.0f} to {last:.0f} MHz")
    throttles = sorted({*before.throttles, *after.throttles})
    if throttles:
        found.append(f"the GPU throttled its clock: {', '.join(throttles)}")
    return tuple(found)


def _processor_mhz() -> float | None:
    rates = [float(value) for value in cpuinfo("cpu MHz")]
    return sum(rates) / len(rates) if rates else None


def _gpu() -> tuple[int | None, int | None, tuple[str, ...]]:
    """Clock in MHz, temperature in °C and throttle reasons of the first GPU from NVML; None without NVML."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # not installed, or no driver
        return None, None, ()
    try:
        device = pynvml.nvmlDeviceGetHandleByUUID(_uuid())
        mhz = int(pynvml.nvmlDeviceGetClockInfo(device, pynvml.NVML_CLOCK_SM))
        celsius = int(pynvml.nvmlDeviceGetTemperature(device, pynvml.NVML_TEMPERATURE_GPU))
        return mhz, celsius, _throttles(pynvml, pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(device))
    except Exception:  # an NVML without these calls, or a GPU split by MIG
        return None, None, ()
    finally:
        pynvml.nvmlShutdown()


def _uuid() -> str:
    """The UUID of PyTorch's GPU 0. (PyTorch and NVML number GPUs differently.)"""
    import torch

    return f"GPU-{torch.cuda.get_device_properties(0).uuid}"


def _throttles(pynvml: Any, bits: int) -> tuple[str, ...]:
    """The names of the throttle reasons whose bits are set."""
    known = ((name, getattr(pynvml, f"nvmlClocksThrottleReason{name}", 0)) for name in THROTTLES)
    return tuple(name for name, bit in known if bits & bit)
