"""Timing of several functions in interleaved rounds on the CPU, in process CPU time or wall time.

Speedups differ between processors, so a results file keeps the rows of each processor: `provenance` marks a row,
`rows_of_other_processors` reads those to keep, and `by_processor` groups them for the tables.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lib.common import commit, rows_of
from mpcompile.measure.timing import speedup
from mpcompile.runtimes import native
from mpcompile.runtimes.ort.int8 import saturates
from mpcompile.system.hardware import cpuinfo


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    block_ms: float,
    wall: bool,
    elsewhere: Mapping[str, Callable[[bool, int], float]] | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Returns milliseconds per call of each function, one value per round (rounds,).

    In each round every function runs for about `block_ms`, at least once; the order is reversed from round to round.
    With `wall`, wall time is measured, else CPU time of this process. CPU time excludes other load on the machine,
    except its effect on shared caches. `elsewhere` are functions that run and time another process: they are called
    with `wall` and a number of runs, and return milliseconds per run.
    """
    timed = {name: partial(_ms_per_call, run) for name, run in runs.items()} | dict(elsewhere or {})
    calls = {}
    for name, ms in timed.items():
        ms(wall, 1)
        calls[name] = max(1, int(block_ms / max(ms(wall, 1), 1e-3)))
    samples: dict[str, list[float]] = {name: [] for name in timed}
    for index in range(rounds):
        for name in list(timed)[:: -1 if index % 2 else 1]:
            samples[name].append(timed[name](wall, calls[name]))
    return {name: np.array(values) for name, values in samples.items()}


def _ms_per_call(run: Callable[[], object], wall: bool, count: int) -> float:
    """Returns milliseconds per call of a function that is called `count` times."""
    clock = time.perf_counter if wall else time.process_time
    started = clock()
    for _ in range(count):
        run()
    return (clock() - started) * 1e3 / count


def median_speedup(baseline: NDArray[np.float64], samples: NDArray[np.float64]) -> tuple[float, float, float]:
    """Returns the median over rounds of baseline / samples, and the ends of its 95 % confidence interval."""
    measured = speedup(baseline, samples, "")
    return measured.ratio, *measured.interval


def speedup_cell(speed: tuple[float, float, float]) -> str:
    """Returns `1.60 (1.57–1.78)`; bold if the whole interval is below 1, that is slower than the baseline."""
    text = f"{speed[0]:.2f} ({speed[1]:.2f}–{speed[2]:.2f})"
    return f"**{text}**" if speed[2] < 1 else text


def processor_name() -> str:
    """Returns the CPU's model name, and how many cores this machine has."""
    return f"{next(iter(cpuinfo('model name')), 'CPU')}, {os.cpu_count()} cores"


def device() -> str:
    """Returns the CPU, and the instruction set that the N:M kernel uses on it."""
    return f"{processor_name()}, kernel {native.instruction_set()}"


def int8_device() -> str:
    """Returns the CPU, the int8 kernel's instruction set, and whether ONNX Runtime multiplies u8 × s8 with VNNI."""
    theirs = "without VNNI" if saturates() else "with VNNI"
    return f"{processor_name()}, int8 kernel {native.int8_instruction_set()}, ONNX Runtime {theirs}"


def processor_with_load() -> str:
    """Returns the CPU, its number of cores, and the load average of the last minute."""
    return f"{processor_name()}, load average {os.getloadavg()[0]:.1f}"


def device_with_load() -> str:
    """Returns the CPU, its number of cores, the load average, and the kernel's instruction set."""
    return f"{processor_with_load()}, kernel {native.instruction_set()}"


def provenance(name: str | None = None) -> dict[str, Any]:
    """Returns the keys that every row of a file with several processors has: device, load, date and commit.

    `name` is the device as it stands in the row; by default `device()`.
    """
    return {
        "device": name or device(),
        "load": os.getloadavg()[0],
        "measured": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
    }


def rows_of_other_processors(file: str, name: str | None = None) -> list[dict[str, Any]]:
    """Returns the rows of results/FILE.json that were measured on another device than `name`; default `device()`."""
    own = name or device()
    return [row for row in rows_of(file) if row["device"] != own]


def by_processor(rows: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yields, per device, a heading with the dates of measurement, and the device's rows.

    Rows of different dates were measured with the kernel of the commit that each row names.
    """
    for name, group in groupby(sorted(rows, key=itemgetter("device")), itemgetter("device")):
        own = list(group)
        days = [row["measured"] for row in own]
        until = f" to {max(days)}" if max(days) > min(days) else ""
        yield f"{name}, measured {min(days)}{until}", own


def load_range(rows: list[dict[str, Any]]) -> str:
    """Returns the lowest and the highest load average of the rows, as text."""
    loads = [row["load"] for row in rows]
    return f"load average {min(loads):.1f} to {max(loads):.1f}"
