"""A model in OpenVINO as a timed call, in a process under another Python (openvino_worker.py)."""

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class OpenVino:
    """A model in OpenVINO, in another process.

    Attributes:
        version: of OpenVINO.
        kernels: how often each kernel runs a product.
    """

    version: str
    kernels: Mapping[str, int]
    _worker: "subprocess.Popen[str]"

    def ms(self, wall: bool, count: int = 1) -> float:
        """Runs the model `count` times, and returns milliseconds per run: wall time or CPU time of the process."""
        assert self._worker.stdin is not None
        assert self._worker.stdout is not None
        self._worker.stdin.write(f"{count}\n")
        self._worker.stdin.flush()
        cpu_ms, wall_ms = map(float, self._worker.stdout.readline().split())
        return wall_ms if wall else cpu_ms


@contextmanager
def openvino(python: str | None, file: Path, shape: Sequence[int], threads: int) -> Iterator[OpenVino | None]:
    """Yields the file as a model in OpenVINO, for inputs of this shape; None if `python` is None.

    OpenVINO runs in a process under `python`. Raises SystemExit if it cannot load the file; stderr has the reason.
    """
    if python is None:
        yield None
        return
    sizes = ",".join(map(str, shape))
    worker = subprocess.Popen(
        [python, str(Path(__file__).parent / "openvino_worker.py"), str(file), sizes, str(threads)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert worker.stdout is not None
        first = worker.stdout.readline()
        if not first:
            raise SystemExit(f"OpenVINO in {python} cannot run {file.name}")
        made = OpenVino(**json.loads(first), _worker=worker)
        for _ in range(3):
            made.ms(True)
        yield made
    finally:
        worker.kill()
        worker.wait()
