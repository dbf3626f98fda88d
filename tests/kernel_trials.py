"""The trials of the native kernels against others, as tests need them: short, and with their outcome handed in."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mpcompile.measure.timing import Speedup, Timing
from mpcompile.runtimes.native import int8_microbenchmark, int8_selection
from mpcompile.runtimes.native import kernel_selection as choose
from mpcompile.runtimes.native import microbenchmark as trial
from mpcompile.runtimes.native.int8_convolutions import Int8Convolution
from mpcompile.runtimes.native.int8_products import Int8Product
from mpcompile.runtimes.native.onnx_rewrite import MaskedGemm
from mpcompile.runtimes.native.packing import Packed


def shorten_trials(patched: pytest.MonkeyPatch, interval: tuple[float, float] | None = None) -> None:
    """Every trial, of products and of whole files, runs the fewest rounds. `interval` replaces what was measured.

    The kernels are taken where the interval lies above 1, so that (1.1, 1.2) takes them for every layer that they
    compute, and in an int8 file for every attention.
    """
    compare_whole, measure_product = choose.compare_whole, int8_microbenchmark.measure_product
    measure_convolution = int8_microbenchmark.measure_convolution

    def handed_in(ratio: Speedup) -> Speedup:
        return ratio if interval is None else replace(ratio, interval=interval)

    def shortened(
        product: MaskedGemm, made: Packed, x: tuple[int, ...], library: Path, threads: int | None, seconds: float
    ) -> tuple[Timing, Timing, Speedup]:
        dense, sparse, ratio = trial.measure(product, made, x, library, threads, 0.0)
        return dense, sparse, handed_in(ratio)

    def in_8_bits(
        product: Int8Product, x: tuple[int, ...], library: Path, threads: int | None, seconds: float
    ) -> tuple[Timing, Timing, Speedup]:
        dense, sparse, ratio = measure_product(product, x, library, threads, 0.0)
        return dense, sparse, handed_in(ratio)

    def convolved(
        convolution: Int8Convolution, x: tuple[int, ...], library: Path, threads: int | None, seconds: float
    ) -> tuple[Timing, Timing, Speedup]:
        dense, sparse, ratio = measure_convolution(convolution, x, library, threads, 0.0)
        return dense, sparse, handed_in(ratio)

    def whole(dense: Any, native: Any, images: NDArray[np.float32], seconds: float, *baseline: str) -> Speedup:
        return handed_in(compare_whole(dense, native, images, 0.0, *baseline))

    patched.setattr(choose, "measure", shortened)
    patched.setattr(int8_selection, "measure_product", in_8_bits)
    patched.setattr(int8_selection, "measure_convolution", convolved)
    for module in (choose, int8_selection):
        patched.setattr(module, "compare_whole", whole)
