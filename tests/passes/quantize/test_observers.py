"""Observers: the laws of each rule, and the activations that have hardly any distribution."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpcompile.ir.quantization import LARGEST_END, Quantizer
from mpcompile.passes.quantize.calibration import range_of
from mpcompile.passes.quantize.observers import (
    BINS,
    LEVELS,
    OBSERVERS,
    SMALLEST_SHARE,
    least_divergence,
    least_error,
    min_max,
    percentile,
)

FLOAT32 = st.floats(-LARGEST_END, LARGEST_END, width=32)
all_observers = pytest.mark.parametrize("name", OBSERVERS)
RNG = torch.Generator().manual_seed(3)
SHAPES = {
    "normal": torch.randn(20_000, generator=RNG),
    "rectified": torch.randn(20_000, generator=RNG).relu(),
    "outliers": torch.cat([torch.randn(20_000, generator=RNG), torch.tensor([300.0, -200.0])]),
    "offset": torch.randn(20_000, generator=RNG) + 20,
    "negative": -torch.rand(20_000, generator=RNG) - 4,
    "heavy tails": torch.randn(20_000, generator=RNG) ** 5,
}
shapes = pytest.mark.parametrize("shape", SHAPES)


def error_of(values: Tensor, low: float, high: float) -> float:
    """The mean squared error of values in 256 levels from low to high."""
    scale = (high - low) / (LEVELS - 1)
    quantised = ((values.double() - low) / scale).round().clamp(0, LEVELS - 1) * scale + low
    return float((values - quantised).square().mean())


@given(st.lists(FLOAT32, min_size=1, max_size=50))
def test_min_max_is_exact(values: list[float]) -> None:
    assert min_max(torch.tensor(values)) == (min(values), max(values))


def test_percentile_leaves_out_outliers_and_nothing_else() -> None:
    values = torch.linspace(-1, 1, 100_000)
    values[[7, 9, 11]] = 1e6  # 0.003 % at one end
    values[[70, 90, 110, 700]] = -1e6
    low, high = percentile(values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))])
    # 5 values are cut at each end; the values next to the outliers are 2e-5 apart.
    assert low == pytest.approx(-1, abs=1e-3)
    assert high == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("count", [1, 2, 100, 19_999])
def test_percentile_of_few_values_is_min_max(count: int) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(0))
    assert percentile(values) == min_max(values)


@shapes
def test_mse_is_never_worse_than_min_max(shape: str) -> None:
    values = SHAPES[shape]
    widest = (min(float(values.min()), 0.0), max(float(values.max()), 0.0))
    # The search sees a histogram: a value is moved by at most half a bin, in both errors.
    bin_width = float(values.max() - values.min()) / BINS
    allowed = (error_of(values, *widest) ** 0.5 + bin_width) ** 2
    assert error_of(values, *least_error(values)) <= allowed


def test_mse_and_entropy_clip_outliers() -> None:
    for observer in (least_error, least_divergence):
        low, high = observer(SHAPES["outliers"])
        assert -200 < low < -3
        assert 3 < high < 300


@all_observers
@shapes
def test_ranges_are_inside_min_max_and_cover_a_fifth_of_it(name: str, shape: str) -> None:
    values = SHAPES[shape]
    low, high = OBSERVERS[name](values)
    assert min(float(values.min()), 0.0) <= low <= high <= max(float(values.max()), 0.0)
    if name in ("mse", "entropy"):
        assert high >= SMALLEST_SHARE * float(values.max())
        assert low <= max(0.0, SMALLEST_SHARE * float(values.min()))


@all_observers
@pytest.mark.parametrize("shape", ["offset", "negative"])
def test_values_far_from_zero_are_not_clipped_away(name: str, shape: str) -> None:
    """A rule that compares only what is inside the range would choose one that holds nothing."""
    values = SHAPES[shape]
    low, high = OBSERVERS[name](values)
    clipped = values.clamp(low, high)
    # Some values at the ends of the distribution may be clipped, not the bulk of it.
    assert float((clipped != values).float().mean()) < 0.1


@all_observers
@pytest.mark.parametrize(
    "values",
    [
        [0.0],
        [0.0, 0.0],
        [3.0],
        [-3.0],
        [2.5] * 50,
        [-2.5] * 50,
        [1.0, 3.0] * 30,
        [-1.0, -3.0] * 30,
        [-1.0, 3.0] * 30,
        [0.0, 5.0] * 30,
        [0.0] * 1000 + [7.0],
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["u8", "s8"])
def test_constants_and_pairs_of_values_survive(name: str, values: list[float], kind: str) -> None:
    x = torch.tensor(values)
    quantizer = Quantizer(kind)  # type: ignore[arg-type]
    quantizer.set_range(*range_of(OBSERVERS[name], x, kind))  # type: ignore[arg-type]
    # One step of min-max, which `mse` and `entropy` may exceed by one candidate range, a 99th narrower.
    step = float(x.abs().max()) * (1 / 127 + 0.011)
    assert (quantizer(x) - x).abs().max() <= step


@all_observers
@settings(max_examples=15)  # `mse` and `entropy` try 240 ranges for each
@given(values=st.lists(FLOAT32, min_size=1, max_size=30))
def test_every_list_of_finite_numbers_has_a_range(name: str, values: list[float]) -> None:
    for kind in ("u8", "s8"):
        quantizer = Quantizer(kind)
        quantizer.set_range(*range_of(OBSERVERS[name], torch.tensor(values), kind))
        assert quantizer(torch.tensor(values)).isfinite().all()


@all_observers
def test_a_symmetric_type_gets_the_range_of_values_and_their_negatives(name: str) -> None:
    low, high = range_of(OBSERVERS[name], SHAPES["rectified"], "s8")
    assert range_of(OBSERVERS[name], SHAPES["rectified"], "u8")[0] == 0 <= -low
    if name in ("min-max", "percentile"):
        assert -low == high
    elif name == "mse":
        # One end is searched after the other, and the second may end a few candidate ranges from the first.
        assert -low == pytest.approx(high, rel=0.05)


@all_observers
def test_values_are_not_changed_and_results_repeat(name: str) -> None:
    values = SHAPES["heavy tails"].clone()
    first = OBSERVERS[name](values)
    assert torch.equal(values, SHAPES["heavy tails"])
    assert OBSERVERS[name](values) == first


@all_observers
def test_float64_values_have_the_range_of_float32_values(name: str) -> None:
    values = SHAPES["normal"]
    # One value of the histogram may fall into the neighbouring bin.
    assert OBSERVERS[name](values.double()) == pytest.approx(OBSERVERS[name](values), rel=0.02)
