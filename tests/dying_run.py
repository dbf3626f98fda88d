"""`mpcompile`, which sends itself a signal at a moment that is named, so that no test has to hit one from outside.

    python -m tests.dying_run '{"signal": 9, "after": "part", "count": 3}' WORDS…

After "part": when so many parts of a long pass are kept (a layer, a checkpoint of a training). After "model.onnx": when
the compressed file is exported, and the output has not taken its name. With a "rank", only that rank of torchrun does.

After "full disk", nothing is signalled: the disk is full when activations are first written to a file.
"""

import errno
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor

from mpcompile.cli.entry_point import main
from mpcompile.export.onnx_export import Lowered, lower
from mpcompile.passes.reconstruct.activation_store import ActivationStore
from mpcompile.pipeline.partial_results import PartialResults


def dies_of(number: int, count: int) -> Callable[[], None]:
    """Sends this process the signal at the `count`-th call."""
    calls = 0

    def called() -> None:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), number)

    return called


def keeping_parts(called: Callable[[], None]) -> Callable[..., None]:
    """`PartialResults.put`, which calls back after each part that is kept."""
    put = PartialResults.put

    def kept(self: PartialResults, name: str, tensors: Mapping[str, Tensor]) -> None:
        put(self, name, tensors)
        called()

    return kept


def exporting(called: Callable[[], None]) -> Callable[..., Lowered]:
    """`lower`, which calls back after model.onnx is exported."""

    def exported(model: Any, path: Path, **options: Any) -> Lowered:
        result = lower(model, path, **options)
        if path.name == "model.onnx":
            called()
        return result

    return exported


if __name__ == "__main__":
    # A suite started in the background ignores interrupts, and so do its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    given = json.loads(sys.argv.pop(1))
    if given.get("rank", 0) == int(os.environ.get("RANK", "0")):
        if given["after"] == "part":
            dies = dies_of(given["signal"], given["count"])
            mock.patch.object(PartialResults, "put", keeping_parts(dies)).start()
        elif given["after"] == "full disk":
            full = OSError(errno.ENOSPC, "No space left on device")
            mock.patch.object(ActivationStore, "_write", side_effect=full).start()
        else:
            dies = dies_of(given["signal"], given["count"])
            mock.patch("mpcompile.driver.run_plan.lower", exporting(dies)).start()
    main()
