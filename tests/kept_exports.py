"""ONNX exports kept between compiles, for tests that compile one model several times and are not about the export."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpcompile.export.onnx_export import Lowered, lower
from mpcompile.ir.model import Model
from mpcompile.pipeline.fingerprint import model_key

Exports = dict[tuple[str, str, str], tuple[Lowered, bytes]]


def keep_exports(patched: pytest.MonkeyPatch, made: Exports) -> None:
    """A model that is in `made` is written as it was exported then, with the metadata of then; others are added to it.

    Models are the same where weights, graph, patterns and file name are; `precision`, `batch` and `opset` have to be.
    """

    def kept(model: Model, path: Path, **options: Any) -> Lowered:
        patterns = repr(sorted((name, str(layer.pattern)) for name, layer in model.plan.items()))
        key = path.name, model_key(model), patterns
        if key not in made:
            found = lower(model, path, **options)
            made[key] = found, path.read_bytes()
            return found
        found, content = made[key]
        for name in ("precision", "batch"):
            assert options[name] == getattr(found, name)
        path.write_bytes(content)
        return replace(found, onnx=path, model=model)

    patched.setattr("mpcompile.driver.run_plan.lower", kept)
