"""Calls that take turns on the CPU, in process CPU time or wall time: what the benchmarks of the kernel share.

Where processors differ much, a results file keeps the rows of each: `stamp`, `elsewhere` and `by_processor`.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lib.common import commit, rows_of
from mpcompile.measure.timing import speedup
from mpcompile.runtimes import native
from mpcompile.system.hardware import cpuinfo


def turns(
    runs: Mapping[str, Callable[[], object]], rounds: int, block_ms: float, wall: bool
) -> dict[str, NDArray[np.float64]]:
    """Milliseconds a call, round by round. Each turn calls as often as fits into `block_ms`, at least once.

    In CPU time, others who use the machine do not count, except through the caches they share.
    """
    clock = time.perf_counter if wall else time.process_time
    calls = {}
    for name, run in runs.items():
        run()
        started = time.perf_counter()
        run()
        calls[name] = max(1, int(block_ms / 1e3 / max(time.perf_counter() - started, 1e-6)))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            started = clock()
            for _ in range(calls[name]):
                runs[name]()
            samples[name].append((clock() - started) * 1e3 / calls[name])
    return {name: np.array(values) for name, values in samples.items()}


def ratio(baseline: NDArray[np.float64], samples: NDArray[np.float64]) -> tuple[float, float, float]:
    """The median speedup and its interval."""
    found = speedup(baseline, samples, "")
    return found.ratio, *found.interval


def shown(found: tuple[float, float, float]) -> str:
    """For people to read; what is slower than the baseline is marked."""
    text = f"{found[0]:.2f} ({found[1]:.2f}–{found[2]:.2f})"
    return f"**{text}**" if found[2] < 1 else text


def processor_name() -> str:
    """The CPU, and how many of its cores are ours."""
    return f"{next(iter(cpuinfo('model name')), 'CPU')}, {os.cpu_count()} cores"


def device() -> str:
    """The CPU, and the instructions that the kernel uses on it."""
    return f"{processor_name()}, kernel {native.instruction_set()}"


def processor() -> str:
    """The CPU, how many of its cores are ours, and how busy they are with other things."""
    return f"{processor_name()}, load average {os.getloadavg()[0]:.1f}"


def busy_device() -> str:
    """`processor`, and the instructions that the kernel uses on it."""
    return f"{processor()}, kernel {native.instruction_set()}"


def stamp() -> dict[str, Any]:
    """What a row says of where and when it was measured, beside other processors' rows in one file."""
    return {
        "device": device(),
        "load": os.getloadavg()[0],
        "measured": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
    }


def elsewhere(name: str) -> list[dict[str, Any]]:
    """The rows of a results file that other processors gave."""
    return [row for row in rows_of(name) if row["device"] != device()]


def by_processor(rows: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The rows of each processor, and its name with the day or days of measuring; the kernel is that of the day."""
    for where, found in groupby(sorted(rows, key=itemgetter("device")), itemgetter("device")):
        here = list(found)
        days = [row["measured"] for row in here]
        until = f" to {max(days)}" if max(days) > min(days) else ""
        yield f"{where}, measured {min(days)}{until}", here


def loads(rows: list[dict[str, Any]]) -> str:
    """How busy the processor was."""
    found = [row["load"] for row in rows]
    return f"load average {min(found):.1f} to {max(found):.1f}"
