"""Int8 weights of a layer, rounded so that its outputs stay those of the dense model.

A weight is stored as scale[o] · q[o, j]: integers q in −127…127, one scale per output channel, no zero point. Zero
stays exactly zero, so a mask holds. `rounded` fits scale and integers to the second moments of the layer's inputs and
target outputs (passes/reconstruct/second_moments.py), on the kept weights only:

1. nearest integers, at max|w| / 127 or the smallest scale at which the lane rule holds;
2. sequential rounding, then coordinate descent (passes/quantize/integer_search.py), at this scale and at one 1 %
   larger, as two starts;
3. the scale refitted to the integers;
4. per row, the result with the least error, of nearest rounding and the search.

On the 24 layers of the example ViT, int8 then adds 5 % (median) of the error that nearest rounding adds to dense
layers, also on images that were not calibrated on. At 2:4 it is 13 %, since fewer columns can compensate.

No weight is clipped: 8 bits leave nothing to gain. For n kept weights with inputs of equal power, the best clipping
lowers the error of nearest rounding by about n / (127² · 12) of itself, which is 1.6 % for 3,072 weights.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor

from mpcompile.errors import PassError
from mpcompile.passes.quantize.integer_search import better_rows, search_for
from mpcompile.passes.quantize.lane_rule import TOP, LaneRule, float32_above, safe_lanes, within_lanes
from mpcompile.passes.reconstruct.second_moments import LeastSquares

STARTS = (1.0, 1.01)  # scales to search at, relative to the smallest that clips nothing
SMALLEST = 2.0**-100  # of the scales, so that products with the scale of an activation are normal float32 numbers


@dataclass(frozen=True, slots=True)
class Rounded:
    """Weights as integers with one scale per output channel. The scales are float32 numbers, held in float64."""

    scale: Float[Tensor, " out"]
    integers: Int8[Tensor, "out columns"]

    @property
    def weight(self) -> Float[Tensor, "out columns"]:
        """The weights that the integers stand for, in float64."""
        return self.integers.double() * self.scale[:, None]


def nearest(weight: Float[Tensor, "out columns"], scale: Float[Tensor, " out"]) -> Int8[Tensor, "out columns"]:
    """The nearest integers to weight / scale, clipped to −127…127."""
    return (weight.double() / scale.double()[:, None]).round().clamp(-TOP, TOP).to(torch.int8)


def row_scales(
    weight: Float[Tensor, "out columns"], least: Tensor | float = 0.0, rule: LaneRule | None = None
) -> Float[Tensor, " out"]:
    """The scale of each row that clips no weight: max|w| / 127, or the floor `least` if that is larger.

    With a rule, rows in which a lane would break it get a larger scale (`lane_rule.safe_lanes`). A row of zeros gets
    the median scale of the other rows, or 1, so that its bias is stored as finely as theirs.

    Raises PassError if a weight or the floor is not finite in float32.
    """
    return _scales_and_lanes(weight, weight != 0, _floor(weight, least), rule)[0]


@torch.no_grad()
def rounded(
    problem: LeastSquares,
    mask: Bool[Tensor, "out columns"],
    start: Float[Tensor, "out columns"],
    *,
    least: Tensor | float = 0.0,
    rule: LaneRule | None = None,
) -> Rounded:
    """The scales and integers of least error that the search finds.

    For every row, the error (`problem.error`) is at most that of the nearest integers at the scale of `row_scales`.
    Rows whose kept weights are all zero stay zero.

    Args:
        problem: the moments to fit. After a refit, give the problem that it solved, which is damped: so weights that
            few images leave undetermined stay near the layer's own.
        mask: the kept weights.
        start: the weights to round, best the refit on this mask. Only the kept ones are read.
        least: the smallest scale, of all rows or of each. A file stores a bias as an int32 multiple of it.
        rule: the lanes that must not saturate; the reach of the result is at most 128 in each. None for no rule.

    Raises PassError if a weight or the floor is not finite, or if the mask keeps more weights than the rule allows.
    """
    weight = torch.where(mask, start.double(), 0.0)
    floor = _floor(weight, least)
    scale, lanes = _scales_and_lanes(weight, mask, floor, rule)
    search = search_for(problem, mask & (weight != 0).any(1, keepdim=True), lanes)
    best = search.result(scale, search.by_column(nearest(weight, scale).double()))
    for factor in STARTS:
        trial = float32_above(scale * factor)
        integers = nearest(weight, trial).double()
        if lanes is not None:  # a larger scale can round up what fitted
            integers = within_lanes(integers, lanes)
        best = better_rows(best, search.run(weight, trial, integers, floor))
    return Rounded(best.scale, search.by_row(best.integers).to(torch.int8))


def _floor(weight: Float[Tensor, "out columns"], least: Tensor | float) -> Float[Tensor, " out"]:
    """The smallest scale of each row. Raises PassError if it is not finite in float32."""
    floor = torch.as_tensor(least, dtype=torch.float64).clamp_min(SMALLEST).expand(len(weight))
    bad = int((~floor.float().isfinite()).sum())
    if bad:
        raise PassError(
            f"the bias of {bad} of {len(weight)} output channels needs a scale that is not finite in float32; int8 "
            "needs finite biases, so --exclude the layer"
        )
    return floor


def _scales_and_lanes(
    weight: Float[Tensor, "out columns"],
    mask: Bool[Tensor, "out columns"],
    floor: Float[Tensor, " out"],
    rule: LaneRule | None,
) -> tuple[Float[Tensor, " out"], Int[Tensor, "out columns"] | None]:
    """The scales of `row_scales` and, with a rule, the lanes. Raises PassError if a weight is not finite."""
    bad = int((~weight.float().isfinite()).any(1).sum())
    if bad:
        raise PassError(
            f"the weights of {bad} of {len(weight)} output channels are not finite in float32; int8 needs finite "
            "weights, so --exclude the layer"
        )
    lanes = None
    if rule is None:
        scale = float32_above(torch.maximum(weight.double().abs().amax(1) / TOP, floor))
    else:
        scale, lanes = safe_lanes(weight, mask, rule, floor)
    used = (weight != 0).any(1)
    typical = scale[used].median() if bool(used.any()) else scale.new_ones(())
    return torch.where(used, scale, torch.maximum(typical, float32_above(floor))), lanes
