"""torch's table of ONNX functions, made once for all exports of a process.

torch.onnx makes it anew for each export, by reading the source of all functions of torchlib: a third of the time in
which a tiny model is compiled.
"""

from typing import Any

import pytest
from torch.onnx._internal.exporter import _registration

REGISTRY = getattr(_registration, "ONNXRegistry", None)
MADE_BY_TORCH = getattr(REGISTRY, "from_torchlib", None)


def keep_registry(patched: pytest.MonkeyPatch) -> None:
    """Each export gets a copy of the table for its opset. Without effect if torch makes the table in another way."""
    if REGISTRY is None or MADE_BY_TORCH is None:
        return
    made: dict[Any, Any] = {}

    def kept(*args: Any, **options: Any) -> Any:
        key = args, tuple(sorted(options.items()))
        if key not in made:
            made[key] = MADE_BY_TORCH(*args, **options)
        copied = REGISTRY()
        vars(copied).update(vars(made[key]))
        copied.functions = {target: list(rows) for target, rows in made[key].functions.items()}
        return copied

    patched.setattr(REGISTRY, "from_torchlib", staticmethod(kept))  # torch calls it on an object, too
