"""The accuracy that a run would report for the dense model, for inputs whose accuracy is known by construction."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from mpcompile.data.images import Data
from mpcompile.driver.inputs import headed
from mpcompile.ir.model import Model
from mpcompile.measure.accuracy import compare
from mpcompile.measure.comparison import Comparison

TOLERANCE = 0.02  # as a share of the images
INSTEAD = "accuracy is not measured"  # in every note that says why accuracy is not measured


def as_run(model: Model) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.no_grad():
            outputs: NDArray[np.float32] = model(torch.from_numpy(images)).numpy()
        return outputs

    return run


def reported(model: Model, data: Data, head: str = "auto") -> tuple[Comparison, tuple[str, ...]]:
    """The comparison of the dense model with itself, and all notes of the report, as `compile` makes them."""
    model, data = headed(model, data, head)
    run = as_run(model)
    found = compare(run, run, data.held_out, head=model.head)
    check = found.dense_check
    return found, (*data.notes, *(check.reasons if check else ()), *(check.remarks if check else ()))


def require_right(found: Comparison, notes: tuple[str, ...], known: float, excuses: tuple[str, ...] = ()) -> None:
    """Asserts that the reported accuracy is the known one, or that a note says why it may not be.

    A note is an excuse if it contains one of `excuses`; if no accuracy is reported, a note has to say so.
    """
    assert found.agreement == 1.0
    if found.dense is None:
        assert any(INSTEAD in note for note in notes), notes
        return
    if any(excuse in note for excuse in excuses for note in notes):
        return
    assert abs(found.dense.top1 - known) <= TOLERANCE, (found.dense.top1, known, notes)
