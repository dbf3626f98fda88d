"""`mpcompile`, which sends itself a signal at a moment that is named, so that no test has to hit one from outside.

    python -m tests.dying_run '{"signal": 9, "after": "part", "count": 3}' WORDS…

After "part": when so many parts of a long pass are kept (a layer, a checkpoint of a training). After "model.onnx": when
the compressed file is exported, and the output has not taken its name.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

import mpcompile.engines as engines
from mpcompile.cli import main
from mpcompile.resume import Finished


def dies_of(number: int, count: int) -> Callable[[], None]:
    """Sends this process the signal at the `count`-th call."""
    calls = 0

    def called() -> None:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), number)

    return called


def after_parts(called: Callable[[], None]) -> None:
    """Calls back after each part that is kept."""
    put = Finished.put

    def kept(self: Finished, name: str, tensors: Mapping[str, Tensor]) -> None:
        put(self, name, tensors)
        called()

    Finished.put = kept  # type: ignore[method-assign]


def after_export(called: Callable[[], None]) -> None:
    """Calls back after model.onnx is exported."""
    lower = engines.lower

    def exported(model: Any, path: Path, **options: Any) -> Any:
        result = lower(model, path, **options)
        if path.name == "model.onnx":
            called()
        return result

    engines.lower = exported  # type: ignore[assignment]


if __name__ == "__main__":
    # A suite started in the background ignores interrupts, and so do its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    given = json.loads(sys.argv.pop(1))
    moments = {"part": after_parts, "model.onnx": after_export}
    moments[given["after"]](dies_of(given["signal"], given["count"]))
    main()
