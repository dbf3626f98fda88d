"""How far two forms of one model are apart, and the gate that stops a wrong one.

Tolerances are on max |Δ| / max |expected| over the outputs of a batch:

- float32 against float32, 1e-4: other kernels sum in another order; some hundred layers of sums over up to a
  few thousand terms leave about 1e-6, and a lost bias or a swapped axis leaves more than 1e-2.
- bfloat16 against float32, 5e-2: weights carry 8 bits (4e-3 each), and nothing else is rounded where it is checked
  on a CPU; measured, 3e-3 to 2e-2.
- float16 against float32, 1e-2: weights and activations carry 11 bits (5e-4 each), and the errors of a hundred
  layers add up; measured, 3e-4 to 2e-3 on ViT, BEiT, ResNet and ConvNeXt.

Where tokens merge, rounding decides between pairs that are equally alike, and an image on which another pair merges has
other outputs (measured in float16, 3 of 256 by up to 1e-1, the same answers on nearly all). There the tolerance holds
for PARITY_QUANTILE of the images: a graph that is wrong is wrong on all.
"""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from mpcompile.errors import ParityError

PARITY_QUANTILE = 0.9
TOLERANCE: Mapping[str, float] = MappingProxyType({"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2})


def relative_difference(expected: NDArray[np.floating], found: NDArray[np.floating]) -> float:
    """The largest |found − expected| over the largest |expected|; infinite where either is not finite."""
    if not (np.isfinite(expected).all() and np.isfinite(found).all()):
        return float("inf")
    scale = max(float(np.abs(expected).max()), float(np.finfo(np.float32).tiny))
    return float(np.abs(found - expected).max() / scale)


def require_parity(
    expected: NDArray[np.floating], found: NDArray[np.floating], precision: str, what: str, merging: bool = False
) -> float:
    """The relative difference, or a ParityError where it is past the tolerance of the precision.

    Where `merging`, it is that of the share PARITY_QUANTILE of the images which differ least.
    """
    if expected.shape != found.shape:
        raise ParityError(f"{what}: the outputs are {found.shape}, and {expected.shape} was expected")
    difference = relative_difference(expected, found)
    if merging and np.isfinite(difference):
        scale = max(float(np.abs(expected).max()), float(np.finfo(np.float32).tiny))
        each = np.abs(found - expected).reshape(len(found), -1).max(1) / scale
        difference = float(np.quantile(each, PARITY_QUANTILE, method="higher"))
    if difference > TOLERANCE[precision]:
        raise ParityError(
            f"{what}: the outputs differ by {difference:.1e} of their size, and {TOLERANCE[precision]:.0e} is allowed "
            f"in {precision}; nothing was written"
        )
    return difference
