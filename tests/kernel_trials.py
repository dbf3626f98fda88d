"""The trials of the N:M kernel against the dense one, as tests need them: short, and with their outcome handed in."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mpcompile.measure.timing import Speedup, Timing
from mpcompile.runtimes.native import kernel_selection as choose
from mpcompile.runtimes.native import microbenchmark as trial
from mpcompile.runtimes.native.onnx_rewrite import MaskedGemm
from mpcompile.runtimes.native.packing import Packed


def shorten_trials(patched: pytest.MonkeyPatch, interval: tuple[float, float] | None = None) -> None:
    """Every trial, of products and of whole files, runs the fewest rounds. `interval` replaces what was measured.

    The kernel is taken where the interval lies above 1, so that (1.1, 1.2) takes it for every layer that it computes.
    """
    compare_whole = choose.compare_whole

    def shortened(
        product: MaskedGemm, made: Packed, x: tuple[int, ...], library: Path, threads: int | None, seconds: float
    ) -> tuple[Timing, Timing, Speedup]:
        dense, sparse, ratio = trial.measure(product, made, x, library, threads, 0.0)
        return dense, sparse, ratio if interval is None else replace(ratio, interval=interval)

    def whole(dense: Any, native: Any, images: NDArray[np.float32], seconds: float) -> Speedup:
        ratio = compare_whole(dense, native, images, 0.0)
        return ratio if interval is None else replace(ratio, interval=interval)

    patched.setattr(choose, "measure", shortened)
    patched.setattr(choose, "compare_whole", whole)
