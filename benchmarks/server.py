"""Load test of our kernels: 8 threads run 6 models for 20 minutes -> results/server.{json,md}.

    python benchmarks/server.py [--minutes 20]

Three models run in float32, with the layers that are measured to be faster on the N:M kernel. Three run in int8, with
every masked layer, LayerNorm and attention on our kernels.

Each thread runs the models at all batch sizes in a random order of its own. It compares every output bit by bit with
the output for the same images before the threads were started. Memory is the resident set of the process, measured
twice a minute. Latency percentiles are from a random sample of at most 20,000 requests per model and batch size. Each
session has one thread, as in a server.
"""

import argparse
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from lib.common import RESULTS, ROOT, markdown, write
from lib.cpu_timing import device
from lib.int8_files import int8_stages
from numpy.typing import NDArray
from safetensors import safe_open

from mpcompile import Recipe, compile
from mpcompile.runtimes import native
from mpcompile.runtimes.ort.int8 import saturates
from mpcompile.runtimes.ort.session import OrtEngine, session_on

EXAMPLE = ROOT / "examples" / "fashion_vit" / "model.safetensors"
PATTERNS = ("2:4", "1:4", "2:4x4")
IMAGE = 1, 28, 28
BATCHES = (1, 2, 8)
THREADS = 8
SAMPLES = 20_000  # latencies kept per model and batch size
WARM_MINUTES = 1.0  # the first memory value that is reported
QUESTION = "Do the kernels leak memory, give wrong outputs or stall when 8 threads run 6 models for 20 minutes?"
COLUMNS = ("model", "batch", "requests", "wrong answers", "p50 ms", "p90 ms", "p99 ms")


def engines(folder: Path) -> dict[str, OrtEngine]:
    """Compiles the example with each pattern, and returns the sessions on our kernels, in float32 and in int8.

    Raises SystemExit if the kernel is missing or no layer is measured to be faster on it.
    """
    if missing := native.missing():
        raise SystemExit(missing)
    by_pattern = {}
    for pattern in PATTERNS:
        step = {"nm-mask": {"pattern": pattern, "criterion": "magnitude", "refit": "none"}}
        recipe = Recipe.checked({"passes": [step], "bench": {"batches": [8], "seconds": 0.1, "threads": 1}})
        output = folder / pattern.replace(":", "_")
        compile(EXAMPLE, recipe, output=output)
        file = output / "model.native.onnx"
        if not file.exists():
            raise SystemExit(f"{pattern}: no layer is faster on the kernel; repeat this on a machine with less load")
        by_pattern[pattern] = session_on(file, 1, native.library())
        quantised = int8_file(output)
        by_pattern[f"{pattern} int8"] = session_on(quantised, 1, native.library())
    return by_pattern


def int8_file(output: Path) -> Path:
    """Writes the int8 file of a compiled model, quantised to the nearest integers on random images.

    Raises SystemExit if one of its masked layers cannot run on the int8 kernel.
    """
    with safe_open(output / "masks.safetensors", "np") as masks:
        layers = list(masks.keys())
    images = np.random.default_rng(0).standard_normal((BATCHES[-1], *IMAGE), dtype=np.float32)
    stages = int8_stages(onnx.load(output / "model.onnx"), images, layers, saturates())
    file = output / "model.int8.native.onnx"
    onnx.save_model(stages.whole, file)
    return file


def resident_bytes() -> int:
    """Returns the size of the process's resident set."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


class Client(threading.Thread):
    """A thread that runs models until `stop` is set, and counts its requests and wrong outputs.

    Keys are (pattern, batch size). `requests` has the images and the expected output of each key.
    """

    def __init__(self, seed: int, models: dict[str, OrtEngine], requests: Any, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self._rng = random.Random(seed)
        self._models, self._requests, self._stop_event = models, requests, stop
        self.counts: dict[tuple[str, int], int] = {}
        self.wrong: dict[tuple[str, int], int] = {}
        # Filled before the start, so that its pages are resident and do not count as growth later.
        self._samples = {key: np.full(SAMPLES // THREADS, np.nan) for key in requests}

    def run(self) -> None:
        """Runs models, compares their outputs, and keeps a uniform random sample of the latencies."""
        keys = list(self._requests)
        while not self._stop_event.is_set():
            key = self._rng.choice(keys)
            images, expected = self._requests[key]
            started = time.perf_counter_ns()
            output = self._models[key[0]](images)
            elapsed_ms = (time.perf_counter_ns() - started) / 1e6
            count = self.counts[key] = self.counts.get(key, 0) + 1
            if not np.array_equal(output, expected):
                self.wrong[key] = self.wrong.get(key, 0) + 1
            samples = self._samples[key]
            if count <= len(samples):
                samples[count - 1] = elapsed_ms
            elif self._rng.random() < len(samples) / count:  # reservoir sampling: all requests are equally likely
                samples[self._rng.randrange(len(samples))] = elapsed_ms

    def times(self, key: tuple[str, int]) -> NDArray[np.float64]:
        """Returns the sampled latencies of a key in milliseconds."""
        return self._samples[key][: self.counts.get(key, 0)]


def row_of(key: tuple[str, int], clients: list[Client]) -> dict[str, Any]:
    """Returns the row of one pattern and batch size, over all threads."""
    times = np.concatenate([client.times(key) for client in clients])
    p50, p90, p99 = np.percentile(times, (50, 90, 99)).tolist()
    return {
        "pattern": key[0],
        "batch": key[1],
        "requests": sum(client.counts.get(key, 0) for client in clients),
        "wrong": sum(client.wrong.get(key, 0) for client in clients),
        "p50_ms": p50,
        "p90_ms": p90,
        "p99_ms": p99,
    }


def cell(value: object) -> str:
    """Returns a value as a cell of the table."""
    return f"{value:.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def main() -> None:
    """Runs the load test, and writes both results files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20, help="duration")
    minutes = parser.parse_args().minutes
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        models = engines(Path(folder))
    requests: dict[tuple[str, int], tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
    for pattern, engine in models.items():
        for batch in BATCHES:
            images = rng.standard_normal((batch, *IMAGE)).astype(np.float32)
            requests[pattern, batch] = images, engine(images)
    stop = threading.Event()
    clients = [Client(seed, models, requests, stop) for seed in range(THREADS)]
    for client in clients:
        client.start()
    started, memory = time.perf_counter(), []
    while (elapsed := (time.perf_counter() - started) / 60) < minutes:
        memory.append((elapsed, resident_bytes()))
        time.sleep(min(30, 60 * (minutes - elapsed)))
    memory.append(((time.perf_counter() - started) / 60, resident_bytes()))
    stop.set()
    for client in clients:
        client.join()
    rows = [row_of(key, clients) for key in requests]
    run = {"minutes": minutes, "threads": THREADS, "memory": memory}
    write(
        "server",
        QUESTION,
        f"{device()}, int8 kernel {native.int8_instruction_set()}",
        ("onnxruntime", "numpy"),
        [*rows, run],
    )
    text = page(rows, run)
    (RESULTS / "server.md").write_text(text, encoding="utf-8")
    print(text)


def page(rows: list[dict[str, Any]], run: dict[str, Any]) -> str:
    """Returns the Markdown page: the table, and the resident memory at four times of the run."""
    minutes, memory = run["minutes"], dict(run["memory"])
    times = [WARM_MINUTES, minutes / 3, 2 * minutes / 3, minutes]
    nearest = [min(memory, key=lambda minute, at=at: abs(minute - at)) for at in times]  # type: ignore[misc]
    used = ", ".join(f"{memory[minute] / 1e6:.1f} MB after {minute:.0f}" for minute in nearest)
    summary = (
        f"{sum(row['requests'] for row in rows):,} requests in {minutes:g} minutes from {run['threads']} threads on "
        f"{device()}, int8 kernel {native.int8_instruction_set()}. Resident memory: {used} minutes."
    )
    table = [tuple(map(cell, row.values())) for row in rows]
    return f"# Load test of a server\n\n{QUESTION}\n\n{markdown(COLUMNS, table)}\n{summary}\n"


if __name__ == "__main__":
    main()
