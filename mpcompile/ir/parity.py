"""Parity: the output difference between two forms of one model (PyTorch, ONNX, engine), and its tolerance.

Tolerances are on max |Δ| / max |expected| over the outputs of a batch:

Values that are the same for every image in both, such as classes that a model masks with −1e9, are left out of
max |expected|: beside them every other difference would be small.

- float32 against float32, 1e-4: kernels sum in different orders. A hundred layers of sums over a few thousand terms
  differ by about 1e-6; a lost bias or a swapped axis differs by more than 1e-2.
- bfloat16 against float32, 5e-2: weights have 8 significant bits (4e-3 each); the check on a CPU rounds nothing else.
  Measured: 3e-3 to 2e-2.
- float16 against float32, 1e-2: weights and activations have 11 significant bits (5e-4 each), and the errors of a
  hundred layers add up. Measured: 3e-4 to 2e-3 on ViT, BEiT, ResNet and ConvNeXt.
- int8 and fp8 against the graph that rounds to the same 8-bit grids, 1e-1 and 2e-1: both compute the same, up to the
  order of floating-point sums. If a sum lies on a boundary between two steps of the next grid, the order decides: the
  activation differs by one step, 1/255 of its range (fp8: 1/16 of its value), and moves sums behind it over other
  boundaries. In a deep model the outputs then differ by as much as quantisation shifts them. Measured: int8 1e-6 on
  most images and 4e-3 at most on the trained example, 2e-2 on EfficientNet-Lite0 and 4e-2 on ViT-tiny with random
  weights; fp8 9e-2 there. The tolerance applies to the PARITY_QUANTILE of the images with the smallest differences.
- int8 and fp8 without the rounding of activations, in file and graph, 1e-3 (UNROUNDED): this finds a wrong weight or
  bias that the tolerance above would hide. Biases in 32 bits are rounded to a step of the products, at most 3e-5.

With token merging, rounding decides between pairs of tokens that are equally similar, and an image on which another
pair merges has different outputs (measured in float16: 3 of 256 images, by up to 1e-1, nearly all with the same top-1).
The tolerance then applies to the same share of the images: a wrong graph is wrong on all.
"""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from mpcompile.errors import ParityError
from mpcompile.ir.precision import QUANTIZED

PARITY_QUANTILE = 0.9
EQUAL = 1e-6  # outputs of different images that differ by less, relative to the largest, are rounding errors
TOLERANCE: Mapping[str, float] = MappingProxyType({"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2, "int8": 1e-1, "fp8": 2e-1})
UNROUNDED = 1e-3


def relative_difference(expected: NDArray[np.floating], found: NDArray[np.floating]) -> float:
    """The relative difference max |found − expected| / max |expected|; infinite if any value is not finite.

    It is 0 for arrays without values.
    """
    if not expected.size:
        return 0.0
    if not (np.isfinite(expected).all() and np.isfinite(found).all()):
        return float("inf")
    return float(np.abs(found - expected).max() / _scale(expected, found))


def fixed_values(expected: NDArray[np.generic], found: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Where outputs (b, …) of two models are one value other than 0 for all of 2 or more images, shape (…)."""
    if expected.ndim == 0 or len(expected) < 2:
        return np.zeros(expected.shape[1:], dtype=np.bool_)
    fixed: NDArray[np.bool_] = (expected == expected[:1]).all(0) & (found == expected).all(0) & (expected[0] != 0)
    return fixed


def _scale(expected: NDArray[np.floating], found: NDArray[np.floating]) -> float:
    """The largest |expected| of the values that are not fixed; of all if all are."""
    fixed = fixed_values(expected, found)
    values = expected if fixed.all() or not fixed.any() else expected[:, ~fixed]
    return max(float(np.abs(values).max()), float(np.finfo(np.float32).tiny))


def is_constant(outputs: NDArray[np.floating]) -> bool:
    """Whether the outputs (b, …) of 2 or more images are the same, to rounding."""
    spread = float(np.ptp(outputs, axis=0).max())
    return len(outputs) > 1 and spread <= EQUAL * _scale(outputs, outputs)


def require_parity(
    expected: NDArray[np.floating], found: NDArray[np.floating], precision: str, what: str, merging: bool = False
) -> float:
    """The relative difference of two outputs (b, …) of one model.

    Args:
        expected: the outputs of the reference.
        found: the outputs that are checked.
        precision: a key of TOLERANCE.
        what: names the comparison at the start of an error.
        merging: whether the model merges tokens. The difference is then, as for 8-bit precisions, the PARITY_QUANTILE
            over images of each image's difference.

    Raises ParityError if the shapes differ, or the difference exceeds the tolerance of `precision`.
    """
    if expected.shape != found.shape:
        raise ParityError(f"{what}: the outputs have shape {found.shape}; the expected shape is {expected.shape}")
    difference = relative_difference(expected, found)
    if (merging or precision in QUANTIZED) and np.isfinite(difference):
        each = np.abs(found - expected).reshape(len(found), -1).max(1) / _scale(expected, found)
        difference = float(np.quantile(each, PARITY_QUANTILE, method="higher"))
    if difference > TOLERANCE[precision]:
        raise ParityError(
            f"{what}: the outputs differ by {difference:.1e} of the largest output; {TOLERANCE[precision]:.0e} is "
            f"allowed in {precision}; nothing was written"
        )
    return difference
