"""Compiles the tiny ViT in int8 on few images, timed as little as possible, for tests of several folders."""

from pathlib import Path
from typing import Any

import pytest
from kernel_trials import shorten_trials

import mpcompile
from mpcompile.driver.artifact import Artifact
from mpcompile.measure.timing import ROUNDS
from mpcompile.recipe.schema import Recipe
from mpcompile.report.quantized_schema import Quantized
from mpcompile.runtimes import native

MASK = {"nm-mask": {"pattern": "2:4"}}
native_kernel = pytest.mark.skipif(native.missing() is not None, reason="the native kernel cannot be used here")


def compiled(files: tuple[Path, Path], output: Path, *passes: Any) -> Artifact:
    """The artifact of these passes, then quantize and certify; every int8 product is native where the kernel runs."""
    recipe = Recipe.checked(
        {
            "passes": [*passes, "quantize", "certify"],
            "precision": "int8",
            "data": {"calibration": 32, "validation": 32, "held_out": 48},
            "bench": {"batches": [1, 2], "seconds": 0.01, "threads": 1},
        }
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("mpcompile.measure.timing.ROUNDS", (ROUNDS[0], ROUNDS[0]))
        shorten_trials(patched, interval=(1.1, 1.2))
        return mpcompile.compile(files[0], recipe, data=files[1], output=output)


def quantized(artifact: Artifact) -> Quantized:
    """The part of the report on 8 bits."""
    found = artifact.report.quantized
    assert found is not None
    return found
