"""A model in OpenVINO as a timed call, in a process under another Python (openvino_worker.py)."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@contextmanager
def openvino(
    python: str | None, file: Path, images: NDArray[np.float32], threads: int
) -> Iterator[Callable[[bool], float] | None]:
    """Yields a function that runs the file once in OpenVINO and returns milliseconds; None if `python` is None.

    The function measures wall time if its argument is true, else CPU time. OpenVINO runs in a process under `python`.
    """
    if python is None:
        yield None
        return
    shape = ",".join(map(str, images.shape))
    worker = subprocess.Popen(
        [python, str(Path(__file__).parent / "openvino_worker.py"), str(file), shape, str(threads)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip

    def run_once(wall: bool) -> float:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
        cpu_ms, wall_ms = map(float, worker.stdout.readline().split())
        return wall_ms if wall else cpu_ms

    try:
        for _ in range(3):
            run_once(True)
        yield run_once
    finally:
        worker.kill()
        worker.wait()
