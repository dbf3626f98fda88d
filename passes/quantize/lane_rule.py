"""Lane rules: which int8 weights of a row share an int16 lane, and the scales at which no lane can saturate.

Without VNNI, x86 multiplies u8 activations by s8 weights with `vpmaddubsw`, which adds two products in an int16 lane
and saturates silently. A kernel may add a second such sum to the lane before it widens to int32. The reach of a lane is

    max(sum of its positive weights, −sum of its negative weights).

For activations a in 0…255, the sum of the products in a lane is at most 255 · (positive sum) and at least
−255 · (−negative sum), and so is the sum over a part of the lane. If the reach is at most 128, both bounds are inside
int16: 255 · 128 = 32,640 ≤ 32,767. The integers are then exact for every input.

The rules:

- `PAIRS`, ONNX Runtime's kernels for AVX2 and AVX-512 without VNNI: columns 2k and 2k + 1 of the flattened row share a
  lane (mpcompile.ir.weight_groups.flat).
- `EIGHT_OF_16`, the masked kernel for at most 8 kept of 16 (2:4, 4:8, 8:16): the kernel adds two steps of one block of
  16 columns, so its 8 kept weights lie in two lanes of 4. Any 4 may share a lane; of the 35 splits, the one with the
  least reach counts.
- `FOUR_OF_16`, the masked kernel for at most 4 kept of 16 (1:4, 2:8, 4:16): the kernel adds one step each of two
  neighbouring blocks of 16, the blocks 2b and 2b + 1. Each block gives two weights to each of two lanes; of the 18
  assignments, the one with the least reach counts. A last block without a neighbour is alone in its lanes.

A row whose width is not a multiple of 16 ends with an incomplete block.
"""

import itertools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from mpcompile.errors import PassError

LIMIT = 128  # the largest reach of a lane: 255 · 128 fits into int16, and 255 · 129 does not
TOP = 127  # the largest magnitude of an int8 weight
BLOCK = 16  # columns that one shuffle of the masked kernel selects from
STEPS = 9  # scales that `safe_lanes` tries above max|w| / 127


@dataclass(frozen=True, slots=True)
class LaneRule:
    """Which weights of a row share an int16 lane.

    Attributes:
        name: as it stands in a report.
        kept: the most weights that a block of 16 columns may keep; None if the lanes are fixed pairs of columns.
        per_lane: weights that share a lane.
        rows: neighbouring rows that share one pattern, and with it the division over lanes.
    """

    name: str
    kept: int | None
    per_lane: int
    rows: int = 1


PAIRS = LaneRule("pairs", None, 2)
EIGHT_OF_16 = LaneRule("8 of 16", 8, 4)
FOUR_OF_16 = LaneRule("4 of 16", 4, 4)


def block_rule(mask: Bool[Tensor, "out columns"], rows: int = 1) -> LaneRule:
    """The rule of the masked kernel that takes this mask, in which `rows` neighbouring rows share their pattern.

    Raises PassError if a block of 16 keeps more than 8.
    """
    most = most_kept(mask)
    rule = FOUR_OF_16 if most <= 4 else EIGHT_OF_16
    _check(most, rule)
    return replace(rule, rows=rows)


def most_kept(mask: Bool[Tensor, "out columns"]) -> int:
    """The most weights that a block of 16 columns keeps."""
    return int(_blocks(mask).sum(-1).max()) if mask.numel() else 0


def _check(most: int, rule: LaneRule) -> None:
    """Raises PassError if a block keeps more weights than the rule allows."""
    if rule.kept is not None and most > rule.kept:
        patterns = "1:4, 2:8 or 4:16" if rule.kept == 4 else "2:4, 4:8 or 8:16"
        raise PassError(
            f"a block of {BLOCK} input channels keeps {most} weights, and the int8 kernel takes at most {rule.kept}; "
            f"give a --pattern of {patterns}"
        )


def _blocks(matrix: Shaped[Tensor, "out columns"]) -> Shaped[Tensor, "out blocks 16"]:
    """The rows in blocks of 16 columns; the last block is filled up with zeros."""
    return F.pad(matrix, (0, -matrix.shape[1] % BLOCK)).reshape(len(matrix), -1, BLOCK)


def lanes_of(
    weight: Shaped[Tensor, "out columns"], mask: Bool[Tensor, "out columns"], rule: LaneRule
) -> Int[Tensor, "out columns"]:
    """The lane of each weight, numbered from 0 in each row, with the least possible reach in each block.

    Columns outside the mask get a lane too; their weight is zero. Raises PassError if a block of 16 keeps more weights
    than the rule allows.
    """
    if rule.kept is None:
        return (torch.arange(weight.shape[1]) // 2).expand(weight.shape)
    _check(most_kept(mask), rule)
    blocks_per_lane = 8 // rule.kept
    kept = _blocks(mask)
    # The places of the kept weights in each block of 16; zeros fill the places of a block that keeps fewer.
    places = kept.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., : rule.kept]
    values = torch.where(kept, _blocks(weight), 0).float().gather(-1, places)
    if blocks_per_lane == 2 and values.shape[1] % 2:
        values, places = (F.pad(t, (0, 0, 0, 1)) for t in (values, places))
    values = values.reshape(len(weight), -1, 8)
    splits = _splits(rule)
    reaches = _reach_of_splits(values, splits)
    if rule.rows > 1:  # one division for all rows that share a pattern
        together = reaches.reshape(-1, rule.rows, *reaches.shape[1:]).amax(1)
        reaches = together.repeat_interleave(rule.rows, 0)
    side = splits[reaches.argmin(-1)].to(torch.int64).reshape(places.shape)
    in_block = torch.zeros(*places.shape[:2], BLOCK, dtype=torch.int64).scatter_(-1, places, side)
    first = 2 * (torch.arange(in_block.shape[1]) // blocks_per_lane)
    return (in_block + first[:, None]).flatten(1)[:, : weight.shape[1]]


def _splits(rule: LaneRule) -> Float[Tensor, "splits 8"]:
    """All ways to divide 8 weights over two lanes, as 0 for the first lane and 1 for the second."""
    if rule.kept == 8:
        halves = [half for half in itertools.combinations(range(8), 4) if 0 not in half]
    else:  # two of each four
        pairs = list(itertools.combinations(range(4), 2))
        halves = [(*a, b[0] + 4, b[1] + 4) for a in pairs if 0 not in a for b in pairs]
    splits = torch.zeros(len(halves), 8)
    return splits.scatter_(1, torch.tensor(halves), 1.0)


def _reach_of_splits(
    values: Float[Tensor, "out blocks 8"], splits: Float[Tensor, "splits 8"]
) -> Float[Tensor, "out blocks splits"]:
    """The larger reach of the two lanes, for each way to divide the 8 values."""
    largest = values.new_zeros(*values.shape[:2], len(splits))
    for part in (values.clamp_min(0), (-values).clamp_min(0)):
        second = part @ splits.T
        largest = torch.maximum(largest, torch.maximum(second, part.sum(-1, keepdim=True) - second))
    return largest


def lane_sums(
    weight: Shaped[Tensor, "out columns"], lanes: Int[Tensor, "out columns"]
) -> tuple[Float[Tensor, "out lanes"], Float[Tensor, "out lanes"]]:
    """Of each lane, the sum of its positive weights and the negated sum of its negative weights."""
    double = weight.double()
    count = int(lanes.max()) + 1 if lanes.numel() else 0
    zeros = torch.zeros(len(weight), count, dtype=torch.float64)
    return (
        zeros.scatter_add(1, lanes, double.clamp_min(0)),
        zeros.scatter_add(1, lanes, (-double).clamp_min(0)),
    )


def reach(weight: Shaped[Tensor, "out columns"], rule: LaneRule) -> Float[Tensor, " out"]:
    """The largest reach of each row's lanes, in the unit of the weights. Zero weights count as not kept.

    Raises PassError if a block of 16 has more nonzero weights than the rule allows.
    """
    return _largest(weight, lanes_of(weight, weight != 0, rule))


def within_lanes(
    integers: Float[Tensor, "out columns"], lanes: Int[Tensor, "out columns"]
) -> Float[Tensor, "out columns"]:
    """The integers with those lanes scaled down, towards zero, whose reach is above the limit; others unchanged."""
    positive, negative = (sums.gather(1, lanes) for sums in lane_sums(integers, lanes))
    over = torch.where(integers > 0, positive, negative)
    return torch.where(over > LIMIT, (integers * (LIMIT / over.clamp_min(1))).trunc(), integers)


def float32_above(scale: Float[Tensor, " out"]) -> Float[Tensor, " out"]:
    """The least float32 numbers that are not below these, in float64: a file stores scales in float32."""
    single = scale.float()
    up = torch.nextafter(single, torch.full_like(single, torch.inf))
    return torch.where(single.double() < scale, up, single).double()


def safe_scale(
    weight: Float[Tensor, "out columns"], rule: LaneRule, least: Tensor | float = 0.0
) -> Float[Tensor, " out"]:
    """The scale of `safe_lanes`, where the nonzero weights are the kept ones."""
    return safe_lanes(weight, weight != 0, rule, least)[0]


def safe_lanes(
    weight: Float[Tensor, "out columns"], mask: Bool[Tensor, "out columns"], rule: LaneRule, least: Tensor | float = 0.0
) -> tuple[Float[Tensor, " out"], Int[Tensor, "out columns"]]:
    """The least tried float32 scale of each row at which its nearest integers fit into these lanes, and the lanes.

    A row whose lanes hold at max(max|w| / 127, least) keeps this scale, and so its 8 bits. Others get the least of a
    few scales between reach / 128 and reach / (128 − k/2), where k weights share a lane. The last one always holds,
    since rounding moves the sum of k weights by at most k/2. A scale above the one returned can break a lane again.
    A row of zeros gets `least`. Weights outside the mask must be zero.
    """
    double = weight.double()
    full = float32_above(torch.maximum(double.abs().amax(1) / TOP, torch.as_tensor(least, dtype=torch.float64)))
    integers = (double / torch.where(full > 0, full, 1.0)[:, None]).round()
    lanes = lanes_of(integers, mask, rule)
    top, scale = _largest(double, lanes), full.clone()
    open_rows = (_largest(integers, lanes) > LIMIT).nonzero().flatten()
    for divisor in torch.linspace(LIMIT, LIMIT - rule.per_lane / 2, STEPS).tolist():
        scale[open_rows] = float32_above(torch.maximum(full, top / divisor)[open_rows])
        integers = (double[open_rows] / scale[open_rows, None]).round()
        open_rows = open_rows[_largest(integers, lanes[open_rows]) > LIMIT]
    return scale, lanes


def _largest(weight: Shaped[Tensor, "out columns"], lanes: Int[Tensor, "out columns"]) -> Float[Tensor, " out"]:
    """The largest reach of each row in these lanes."""
    if not weight.numel():
        return torch.zeros(len(weight), dtype=torch.float64)
    positive, negative = lane_sums(weight, lanes)
    return torch.maximum(positive, negative).amax(1)
