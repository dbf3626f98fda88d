"""A server's life on the N:M kernel: 8 threads ask 3 models for 20 minutes -> results/server.{json,md}.

    python benchmarks/server.py [--minutes 20]

Each thread asks for one of the models at one of the batch sizes, in an order of its own, and compares every answer bit
by bit with what the same model gave alone at the start. Memory is the process's resident set, twice a minute; latencies
are a sample of 20,000 a model and batch. Sessions have one thread of their own, as a server would run them.
"""

import argparse
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from lib.common import RESULTS, ROOT, markdown, write
from lib.cpu_turns import device
from numpy.typing import NDArray

from mpcompile import Recipe, compile
from mpcompile.runtimes import native
from mpcompile.runtimes.ort.session import OrtEngine, session_on

EXAMPLE = ROOT / "examples" / "fashion_vit" / "model.safetensors"
PATTERNS = ("2:4", "1:4", "2:4x4")
BATCHES = (1, 2, 8)
THREADS = 8
SAMPLES = 20_000
WARM_MINUTES = 1.0
QUESTION = "does the kernel leak, err or stall when 8 threads ask three models for 20 minutes?"
COLUMNS = ("model", "batch", "requests", "wrong answers", "p50 ms", "p90 ms", "p99 ms")


def engines(folder: Path) -> dict[str, OrtEngine]:
    """The example at each pattern, on the kernel. Raises SystemExit where that is not there or not faster."""
    if missing := native.missing():
        raise SystemExit(missing)
    found = {}
    for pattern in PATTERNS:
        step = {"nm-mask": {"pattern": pattern, "criterion": "magnitude", "refit": "none"}}
        recipe = Recipe.checked({"passes": [step], "bench": {"batches": [8], "seconds": 0.1, "threads": 1}})
        output = folder / pattern.replace(":", "_")
        compile(EXAMPLE, recipe, output=output)
        file = output / "model.native.onnx"
        if not file.exists():
            raise SystemExit(f"{pattern}: no layer was measured to be faster on the kernel; try on a quieter machine")
        found[pattern] = session_on(file, 1, native.library())
    return found


def resident_bytes() -> int:
    """The process's resident set."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


class Client(threading.Thread):
    """One thread that asks until it is told to stop."""

    def __init__(self, number: int, models: dict[str, OrtEngine], asked: Any, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self._rng = random.Random(number)
        self._models, self._asked, self._stopped = models, asked, stop
        self.counts: dict[tuple[str, int], int] = {}
        self.wrong: dict[tuple[str, int], int] = {}
        # Written once before the start, so that no page of it counts as growth later.
        self._kept = {key: np.full(SAMPLES // THREADS, np.nan) for key in asked}

    def run(self) -> None:
        """Asks and compares."""
        keys = list(self._asked)
        while not self._stopped.is_set():
            key = self._rng.choice(keys)
            images, expected = self._asked[key]
            started = time.perf_counter_ns()
            answer = self._models[key[0]](images)
            taken = (time.perf_counter_ns() - started) / 1e6
            count = self.counts[key] = self.counts.get(key, 0) + 1
            if not np.array_equal(answer, expected):
                self.wrong[key] = self.wrong.get(key, 0) + 1
            kept = self._kept[key]
            if count <= len(kept):
                kept[count - 1] = taken
            elif self._rng.random() < len(kept) / count:  # every request is as likely to be kept
                kept[self._rng.randrange(len(kept))] = taken

    def times(self, key: tuple[str, int]) -> NDArray[np.float64]:
        """The milliseconds that were kept of a model and batch."""
        return self._kept[key][: self.counts.get(key, 0)]


def row_of(key: tuple[str, int], clients: list[Client]) -> dict[str, Any]:
    """What all threads together saw of one model and batch."""
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


def spelt(value: object) -> str:
    """A cell of the table."""
    return f"{value:.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def main() -> None:
    """Runs for so long and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    minutes = parser.parse_args().minutes
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        models = engines(Path(folder))
    asked: dict[tuple[str, int], tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
    for pattern, engine in models.items():
        for batch in BATCHES:
            images = rng.standard_normal((batch, 1, 28, 28)).astype(np.float32)
            asked[pattern, batch] = images, engine(images)
    stop = threading.Event()
    clients = [Client(number, models, asked, stop) for number in range(THREADS)]
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
    rows = [row_of(key, clients) for key in asked]
    life = {"minutes": minutes, "threads": THREADS, "memory": memory}
    write("server", QUESTION, device(), ("onnxruntime", "numpy"), [*rows, life])
    text = report(rows, life)
    (RESULTS / "server.md").write_text(text, encoding="utf-8")
    print(text)


def report(rows: list[dict[str, Any]], life: dict[str, Any]) -> str:
    """The page for people."""
    minutes, used = life["minutes"], dict(life["memory"])
    wanted = [WARM_MINUTES, minutes / 3, 2 * minutes / 3, minutes]
    at = [min(used, key=lambda minute, near=near: abs(minute - near)) for near in wanted]  # type: ignore[misc]
    told = ", ".join(f"{used[minute] / 1e6:.1f} MB after {minute:.0f}" for minute in at)
    said = (
        f"{sum(row['requests'] for row in rows):,} requests in {minutes:g} minutes from {life['threads']} threads on "
        f"{device()}. Resident memory: {told} minutes."
    )
    table = [tuple(map(spelt, row.values())) for row in rows]
    return f"# A server's life\n\n{QUESTION}\n\n{markdown(COLUMNS, table)}\n{said}\n"


if __name__ == "__main__":
    main()
