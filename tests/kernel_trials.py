"""The trial of the N:M kernel against the dense one, as tests need it: short, and with its outcome handed in."""

from dataclasses import replace
from pathlib import Path

import pytest

from mpcompile.measure.timing import Speedup, Timing
from mpcompile.runtimes.native import kernel_selection as choose
from mpcompile.runtimes.native import microbenchmark as trial
from mpcompile.runtimes.native.onnx_rewrite import MaskedGemm
from mpcompile.runtimes.native.packing import Packed


def shorten_trials(patched: pytest.MonkeyPatch, interval: tuple[float, float] | None = None) -> None:
    """Every trial runs the fewest rounds. With `interval` its speedup has that interval, whatever was measured.

    The kernel is taken where the interval lies above 1, so that (1.1, 1.2) takes it for every layer that it computes.
    """

    def shortened(
        product: MaskedGemm, made: Packed, x: tuple[int, ...], library: Path, threads: int | None, seconds: float
    ) -> tuple[Timing, Timing, Speedup]:
        dense, sparse, ratio = trial.measure(product, made, x, library, threads, 0.0)
        return dense, sparse, ratio if interval is None else replace(ratio, interval=interval)

    patched.setattr(choose, "measure", shortened)
