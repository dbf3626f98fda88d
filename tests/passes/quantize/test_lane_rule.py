"""Lane rules: no lane can leave int16 for any activation, against an emulation of vpmaddubsw and brute force."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpcompile.errors import PassError
from mpcompile.ir.pattern import NM
from mpcompile.passes.nm_mask.selection import nm_mask
from mpcompile.passes.quantize.lane_rule import (
    EIGHT_OF_16,
    FOUR_OF_16,
    LIMIT,
    PAIRS,
    LaneRule,
    block_rule,
    float32_above,
    lane_sums,
    lanes_of,
    reach,
    safe_lanes,
    safe_scale,
    within_lanes,
)

RULES = (PAIRS, EIGHT_OF_16, FOUR_OF_16)
PATTERNS = {PAIRS: NM(2, 4), EIGHT_OF_16: NM(2, 4), FOUR_OF_16: NM(1, 4)}


def gaussian(rows: int, columns: int, pattern: NM, seed: int = 0) -> Tensor:
    """Gaussian weights, the largest of each group kept."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.where(nm_mask(weight.square(), pattern), weight, 0)


def saturated(sums: np.ndarray) -> np.ndarray:
    """The sums as int16 lanes hold them."""
    return np.asarray(np.clip(sums, -(2**15), 2**15 - 1))


@pytest.mark.parametrize(
    ("q", "exact"),
    [
        ((127, 1), True),
        ((64, 64), True),
        ((-127, -1), True),
        ((127, -127), True),
        ((-1, 127), True),
        ((127, 2), False),
        ((-65, -64), False),
    ],
)
def test_a_pair_is_exact_for_all_65536_inputs_iff_its_reach_is_at_most_128(q: tuple[int, int], exact: bool) -> None:
    first, second = np.meshgrid(np.arange(256), np.arange(256))
    sums = first * q[0] + second * q[1]
    assert np.array_equal(saturated(sums), sums) == exact
    assert (float(reach(torch.tensor([q]), PAIRS)) <= LIMIT) == exact


def test_every_pair_of_weights_is_exact_iff_its_reach_is_at_most_128() -> None:
    # A sum of products is linear in each input, so its extremes are at inputs of 0 and 255.
    q = np.stack(np.meshgrid(np.arange(-127, 128), np.arange(-127, 128)), -1).reshape(-1, 2)
    extremes = q @ np.array(list(itertools.product((0, 255), repeat=2))).T
    exact = (saturated(extremes) == extremes).all(1)
    assert np.array_equal(reach(torch.from_numpy(q), PAIRS).numpy() <= LIMIT, exact)


@pytest.mark.parametrize("rule", [EIGHT_OF_16, FOUR_OF_16], ids=lambda rule: rule.name)
def test_the_masked_kernel_is_exact_on_random_and_on_extreme_inputs(rule: LaneRule) -> None:
    weight = gaussian(16, 96, PATTERNS[rule])
    scale, lanes = safe_lanes(weight, weight != 0, rule)
    q = (weight / scale[:, None]).round().to(torch.int64).numpy()
    rng = np.random.default_rng(0)
    for row in range(len(q)):
        for lane in range(int(lanes.max()) + 1):
            columns = np.flatnonzero((lanes[row].numpy() == lane) & (q[row] != 0))
            columns = np.pad(columns, (0, 4 - len(columns)), constant_values=-1)
            w = np.where(columns < 0, 0, q[row, columns])
            # Two steps of two products each, in any order; all 16 extremes and 200 random inputs.
            extremes = np.array(list(itertools.product((0, 255), repeat=4)))
            inputs = np.concatenate([extremes, rng.integers(0, 256, (200, 4))])
            for order in itertools.permutations(range(4)):
                products = (inputs * w)[:, order]
                steps = saturated(products[:, :2].sum(1)), saturated(products[:, 2:].sum(1))
                assert np.array_equal(saturated(steps[0] + steps[1]), products.sum(1))


def brute_force_eight(values: list[float]) -> float:
    """The least reach of 8 values over all ways to divide them over two lanes of 4."""
    return min(
        max(lane_reach([values[i] for i in half]), lane_reach([values[i] for i in range(8) if i not in half]))
        for half in itertools.combinations(range(8), 4)
    )


def brute_force_four(first: list[float], second: list[float]) -> float:
    """The least reach of two blocks of 4 values, two of each block in each of two lanes."""
    pairs = list(itertools.combinations(range(4), 2))
    return min(
        max(
            lane_reach([first[i] for i in a] + [second[i] for i in b]),
            lane_reach([first[i] for i in range(4) if i not in a] + [second[i] for i in range(4) if i not in b]),
        )
        for a in pairs
        for b in pairs
    )


def lane_reach(values: list[float]) -> float:
    return max(sum(v for v in values if v > 0), -sum(v for v in values if v < 0))


@settings(max_examples=60)
@given(st.lists(st.integers(-127, 127), min_size=8, max_size=8), st.integers(0, 2**16 - 1))
def test_the_lanes_of_a_block_are_the_best_of_all(values: list[int], seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    block = torch.zeros(16, dtype=torch.int64)
    block[torch.randperm(16, generator=rng)[:8]] = torch.tensor(values)
    assert float(reach(block[None], EIGHT_OF_16)) == brute_force_eight([float(v) for v in values])
    two = torch.zeros(2, 16, dtype=torch.int64)
    for i in range(2):
        two[i, torch.randperm(16, generator=rng)[:4]] = torch.tensor(values[4 * i : 4 * i + 4])
    first, second = ([float(v) for v in values[i : i + 4]] for i in (0, 4))
    assert float(reach(two.reshape(1, 32), FOUR_OF_16)) == brute_force_four(first, second)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("columns", [1, 9, 16, 48, 52])
def test_a_lane_holds_as_many_weights_as_the_kernel_adds(rule: LaneRule, columns: int) -> None:
    pattern = PATTERNS[rule]
    weight = gaussian(20, -(-columns // 4) * 4, pattern)[:, :columns]
    mask = weight != 0
    lanes = lanes_of(weight, mask, rule)
    assert lanes.shape == weight.shape
    for row in range(len(weight)):
        for lane in lanes[row].unique():
            members = ((lanes[row] == lane) & mask[row]).nonzero().flatten()
            assert len(members) <= rule.per_lane
            per_block = (members // 16).bincount()
            assert (per_block <= (4 if rule is EIGHT_OF_16 else 2)).all()
            reaches_over = {PAIRS: 2, EIGHT_OF_16: 16, FOUR_OF_16: 32}[rule]
            assert len((members // reaches_over).unique()) <= 1
    positive, negative = lane_sums(weight, lanes)
    assert torch.equal(torch.maximum(positive, negative).amax(1), reach(weight, rule))


@settings(max_examples=60)
@given(st.sampled_from(RULES), st.integers(0, 2**16), st.floats(0, 4), st.sampled_from([0.0, 0.02, 10.0]))
def test_no_lane_breaks_at_the_safe_scale(rule: LaneRule, seed: int, tail: float, least: float) -> None:
    weight = gaussian(8, 48, PATTERNS[rule], seed)
    weight = weight.sign() * weight.abs() ** tail  # from equal magnitudes to a heavy tail
    scale = safe_scale(weight, rule, least)
    integers = (weight / scale[:, None]).round()
    full = float32_above((weight.abs().amax(1) / 127).clamp_min(least))
    assert torch.equal(scale, scale.float().double())
    assert (scale >= full).all()
    assert (integers.abs() <= 127).all()
    assert (reach(integers, rule) <= LIMIT).all()
    fits = reach((weight / full[:, None]).round(), rule) <= LIMIT
    assert torch.equal(scale[fits], full[fits])  # these rows keep their 8 bits
    # No scale is larger than the proof needs, up to the choice of lanes before and after rounding.
    assert (scale <= torch.maximum(full, 1.02 * reach(weight, rule) / (LIMIT - rule.per_lane / 2))).all()


@pytest.mark.parametrize(
    ("pattern", "rule", "bits"),
    [
        (NM(2, 4), EIGHT_OF_16, 0.61),
        (NM(8, 16), EIGHT_OF_16, 0.67),
        (NM(1, 4), FOUR_OF_16, 0.77),
        (NM(2, 4), PAIRS, 0.34),
    ],
    ids=str,
)
def test_the_price_in_bits_on_gaussian_weights(pattern: NM, rule: LaneRule, bits: float) -> None:
    # Seven bits for all weights (ONNX Runtime's reduce_range) cost 1.0.
    weight = gaussian(192, 768, pattern)
    price = (safe_scale(weight, rule) / (weight.abs().amax(1) / 127)).log2().mean()
    assert float(price) == pytest.approx(bits, abs=0.02)


def test_stored_scales_are_never_below_the_wanted_ones() -> None:
    wanted = torch.tensor([0.0, 1.0, 0.1, 1 / 3, 0.7], dtype=torch.float64)
    stored = float32_above(wanted)
    assert torch.equal(stored, stored.float().double())
    assert (stored >= wanted).all()
    assert stored[:2].tolist() == [0, 1]
    assert (stored <= wanted * (1 + 2**-23)).all()


def test_only_lanes_over_the_limit_are_scaled_down() -> None:
    q = torch.tensor([[127.0, 1, 127, 2, -127, -127, 127, -127]])
    lanes = lanes_of(q, q != 0, PAIRS)
    assert within_lanes(q, lanes).tolist() == [[127, 1, 126, 1, -64, -64, 127, -127]]


def test_the_rule_of_a_mask_is_that_of_its_fullest_block() -> None:
    mask = torch.zeros(2, 40, dtype=torch.bool)
    mask[0, 16:20] = True
    assert block_rule(mask) == FOUR_OF_16
    mask[1, 32:40] = True
    assert block_rule(mask) == EIGHT_OF_16
    mask[0, 16:25] = True
    with pytest.raises(PassError, match=r"keeps 9 weights.* at most 8; give a --pattern of 2:4"):
        block_rule(mask)
    with pytest.raises(PassError, match=r"keeps 9 weights.* at most 4; give a --pattern of 1:4"):
        reach(mask.double(), FOUR_OF_16)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_rows_of_zeros_have_no_reach(rule: LaneRule) -> None:
    assert reach(torch.zeros(2, 20), rule).tolist() == [0, 0]
    assert safe_scale(torch.zeros(2, 20), rule).tolist() == [0, 0]
    assert safe_scale(torch.zeros(2, 20), rule, 0.5).tolist() == [0.5, 0.5]


@settings(max_examples=60)
@given(st.sampled_from([EIGHT_OF_16, FOUR_OF_16]), st.sampled_from([2, 4]), st.integers(0, 2**16), st.floats(0, 4))
def test_rows_that_share_a_pattern_share_their_lanes(rule: LaneRule, rows: int, seed: int, tail: float) -> None:
    """The kernel shuffles the activations once for these rows, so one division must keep all of them exact."""
    shared = replace(rule, rows=rows)
    pattern = replace(PATTERNS[rule], rows=rows)
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 64, generator=rng, dtype=torch.float64)
    weight = weight.sign() * weight.abs() ** tail
    mask = nm_mask(weight.square(), pattern)
    weight = torch.where(mask, weight, 0)
    assert block_rule(mask, rows) == shared
    scale, lanes = safe_lanes(weight, mask, shared)
    integers = (weight / scale[:, None]).round()
    for first in range(0, len(weight), rows):
        group = slice(first, first + rows)
        assert (mask[group] == mask[first]).all()
        assert (lanes[group] == lanes[first]).all()
    positive, negative = lane_sums(integers, lanes)
    assert (torch.maximum(positive, negative) <= LIMIT).all()
    assert (integers.abs() <= 127).all()


def test_the_division_of_sharing_rows_has_the_least_common_reach() -> None:
    rng = torch.Generator().manual_seed(0)
    values = torch.randint(-127, 128, (2, 8), generator=rng)
    weight = torch.zeros(2, 16, dtype=torch.int64)
    weight[:, torch.randperm(16, generator=rng)[:8].sort().values] = values
    shared = replace(EIGHT_OF_16, rows=2)
    lanes = lanes_of(weight, (weight != 0).any(0).expand(2, 16), shared)
    found = max(float(sums.max()) for sums in lane_sums(weight, lanes))
    best = min(
        max(
            lane_reach([float(row[i]) for i in side])
            for row in values
            for side in (half, [i for i in range(8) if i not in half])
        )
        for half in itertools.combinations(range(8), 4)
    )
    assert found == best
