"""Rounding to int8: never worse than the nearest integers, masks and lanes hold, against brute force and GPTQ."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mpcompile.errors import PassError
from mpcompile.ir.pattern import NM
from mpcompile.ir.weight_groups import flat
from mpcompile.passes.nm_mask.selection import nm_mask
from mpcompile.passes.quantize import integer_search
from mpcompile.passes.quantize.lane_rule import EIGHT_OF_16, FOUR_OF_16, LIMIT, PAIRS, LaneRule, reach
from mpcompile.passes.quantize.rounding import SMALLEST, Rounded, nearest, rounded, row_scales
from mpcompile.passes.reconstruct.layer_rows import product
from mpcompile.passes.reconstruct.least_squares import damped, refit, unconstrained
from mpcompile.passes.reconstruct.second_moments import LeastSquares, SecondMoments

RULES = (None, PAIRS, EIGHT_OF_16, FOUR_OF_16)
PATTERNS = {None: NM(2, 4), PAIRS: NM(2, 4), EIGHT_OF_16: NM(2, 4), FOUR_OF_16: NM(1, 4)}


def problem_of(
    rows: int, columns: int, groups: int = 1, seed: int = 0, samples: int = 200, correlated: bool = True
) -> tuple[LeastSquares, Tensor]:
    """A problem, and the weights that solve it but for noise in the targets."""
    rng = torch.Generator().manual_seed(seed)
    decay = torch.linspace(0, -4, columns).exp()  # of the spectrum, as activations have it
    mix = decay[:, None] * torch.randn(groups, columns, columns, generator=rng) if correlated else torch.eye(columns)
    x = torch.randn(groups, samples, columns, generator=rng).double() @ mix.double() + 0.5
    weight = torch.randn(rows, columns, generator=rng).double()
    y = x @ weight.reshape(groups, -1, columns).mT
    y = y + 0.1 * y.std() * torch.randn(y.shape, generator=rng)
    cross, power = (y.mT @ x / samples).flatten(0, 1), y.square().mean(1).flatten()
    gram, mean_y = x.mT @ x / samples, y.mean(1).flatten()
    return LeastSquares(gram, cross, power, x.mean(1), mean_y, samples), weight


def masked(problem: LeastSquares, weight: Tensor, pattern: NM) -> tuple[Tensor, Tensor, LeastSquares]:
    """A mask by magnitude, the refit on it and the damped problem."""
    fitted = damped(problem, weight, 0.01)
    mask = nm_mask(weight.square(), pattern)
    return mask, refit(fitted, mask), fitted


def check(problem: LeastSquares, mask: Tensor, start: Tensor, result: Rounded, rule: LaneRule | None = None) -> None:
    """The laws of `rounded`, with no floor."""
    weight = torch.where(mask, start.double(), 0)
    scale = row_scales(weight, 0.0, rule)
    plain = nearest(weight, scale).double() * scale[:, None]
    # The relative rounding of the sums in float64, many times over.
    assert (problem.error(result.weight) <= problem.error(plain) + 1e-11 * problem.power + 1e-300).all()
    assert not result.integers[~mask].any()
    assert result.integers.dtype == torch.int8
    assert (result.integers.int().abs() <= 127).all()
    assert torch.equal(result.scale, result.scale.float().double())  # a file stores float32
    assert (result.scale >= SMALLEST).all()
    assert result.scale.isfinite().all()
    if rule is not None:
        assert (reach(result.integers, rule) <= LIMIT).all()


def special_rows(weight: Tensor) -> Tensor:
    """The weights with a constant row, one of zeros, one of denormal numbers and one with a single weight."""
    weight = weight.clone()
    weight[0], weight[1], weight[2] = 0.3, 0.0, 1e-40
    weight[3, 1:] = 0
    return weight


@settings(max_examples=60)
@given(
    st.sampled_from(RULES),
    st.sampled_from([(8, 4, 1), (6, 20, 1), (8, 12, 2), (6, 9, 6), (5, 1, 1), (7, 40, 1)]),
    st.integers(0, 2**16),
    st.sampled_from([3, 200]),  # 3 samples: C is singular
    st.booleans(),
)
def test_no_row_is_worse_than_nearest(
    rule: LaneRule | None, shape: tuple[int, int, int], seed: int, samples: int, special: bool
) -> None:
    rows, columns, groups = shape
    problem, weight = problem_of(rows, columns, groups, seed, samples)
    start = special_rows(weight) if special and columns > 1 else weight
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.7
    if rule is not None and rule.kept is not None:
        mask &= torch.arange(columns) * 5 % 16 < rule.kept  # at most so many in each block of 16
    check(problem, mask, start, rounded(problem, mask, start, rule=rule), rule)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_search_leaves_a_fraction_of_the_error_of_nearest(rule: LaneRule | None) -> None:
    problem, weight = problem_of(48, 64)
    mask, start, fitted = masked(problem, weight, PATTERNS[rule])
    assert added_error(fitted, mask, start, rule) < 0.5
    if rule is None or rule.kept is None:  # the masked kernel takes no dense weights
        mask, start = torch.ones_like(weight, dtype=torch.bool), unconstrained(fitted)
        assert added_error(fitted, mask, start, rule) < 0.2


def added_error(problem: LeastSquares, mask: Tensor, start: Tensor, rule: LaneRule | None) -> float:
    """The error that int8 adds to that of the float weights, relative to nearest rounding."""
    result, scale = rounded(problem, mask, start, rule=rule), row_scales(start, 0.0, rule)
    check(problem, mask, start, result, rule)
    exact, plain = problem.error(start).sum(), problem.error(nearest(start, scale) * scale[:, None]).sum()
    return float((problem.error(result.weight).sum() - exact) / (plain - exact))


def brute_force(problem: LeastSquares, start: Tensor, within: int) -> Tensor:
    """The least error of each row at the scale of nearest rounding, over all integers up to `within` from nearest."""
    scale = row_scales(start)[:, None, None]
    steps = torch.tensor(list(itertools.product(range(-within, within + 1), repeat=start.shape[1]))).double()
    weights = ((start[:, None] / scale).round() + steps) * scale  # row, choice, column
    square = ((weights @ problem.gram[0]) * weights).sum(-1)
    return (problem.power[:, None] - 2 * (weights * problem.cross[:, None]).sum(-1) + square).amin(1)


@pytest.mark.parametrize(("columns", "within", "optimal"), [(2, 20, 1.0), (4, 3, 0.8)])
def test_small_rows_reach_the_optimum_over_all_integers(columns: int, within: int, optimal: float) -> None:
    problem, weight = problem_of(100, columns)
    start = unconstrained(problem)
    best = brute_force(problem, start, within)
    found = problem.error(rounded(problem, torch.ones_like(weight, dtype=torch.bool), start).weight)
    assert float((found <= best + 1e-12 * problem.power).double().mean()) >= optimal


def test_inputs_without_correlation_leave_nothing_to_compensate() -> None:
    # Nearest is then the optimum over all integers at each scale. The search can only find a better scale.
    problem, weight = problem_of(50, 2, correlated=False)
    gram = torch.diag_embed(problem.gram.diagonal(dim1=1, dim2=2))
    problem = replace(problem, gram=gram, cross=weight @ gram[0])
    found = problem.error(rounded(problem, torch.ones_like(weight, dtype=torch.bool), weight).weight)
    scale = row_scales(weight)
    plain = problem.error(nearest(weight, scale) * scale[:, None])
    torch.testing.assert_close(brute_force(problem, weight, 20), plain)
    assert (found <= plain + 1e-11 * problem.power).all()


def gptq(gram: Tensor, weight: Tensor) -> Tensor:
    """GPTQ as published, for one row and a scale of 1: columns in order, Cholesky factor of the inverse of C."""
    upper = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    w, q = weight.clone(), torch.zeros_like(weight)
    for j in range(len(w)):
        q[j] = w[j].round()
        w[j:] -= (w[j] - q[j]) / upper[j, j] * upper[j, j:]
    return q


def test_sequential_rounding_gives_the_integers_of_gptq(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer_search, "SWEEPS", 0)
    problem, weight = problem_of(20, 24)
    weight = weight * 20
    search = integer_search.search_for(problem, torch.ones_like(weight, dtype=torch.bool), None)
    one = torch.ones(20, dtype=torch.float64)
    found = search.by_row(search.run(weight, one, weight.round(), one).integers)
    order = problem.gram[0].diagonal().argsort(descending=True)
    gram = problem.gram[0] + integer_search.DAMPING * problem.gram[0].diagonal().mean() * torch.eye(24)
    for row in range(20):
        assert torch.equal(found[row, order], gptq(gram[order][:, order], weight[row, order]))


def test_coordinate_descent_never_raises_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, weight = problem_of(30, 40)
    mask, start, fitted = masked(problem, weight, NM(2, 4))
    scale = row_scales(start)
    errors = []
    for sweeps in (0, 1, 2, 3):
        monkeypatch.setattr(integer_search, "SWEEPS", sweeps)
        search = integer_search.search_for(fitted, mask, None)
        found = search.run(start, scale, nearest(start, scale).double(), scale)
        errors.append(search.result(scale, found.integers).error)
    for before, after in itertools.pairwise(errors):
        assert (after <= before * (1 + 1e-6)).all()  # targets are float32
    assert errors[1].sum() < errors[0].sum()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_groups_are_rounded_as_layers_of_their_own(rule: LaneRule | None) -> None:
    problem, weight = problem_of(12, 20, groups=3)
    mask = nm_mask(weight.square(), PATTERNS[rule])
    whole = rounded(problem, mask, weight, rule=rule)
    for group in range(3):
        rows = slice(4 * group, 4 * group + 4)
        own = replace(
            problem,
            gram=problem.gram[group : group + 1],
            mean_x=problem.mean_x[group : group + 1],
            cross=problem.cross[rows],
            power=problem.power[rows],
            mean_y=problem.mean_y[rows],
        )
        alone = rounded(own, mask[rows], weight[rows], rule=rule)
        assert torch.equal(alone.integers, whole.integers[rows])
        torch.testing.assert_close(alone.scale, whole.scale[rows], rtol=1e-6, atol=0)


@torch.no_grad()
@pytest.mark.parametrize(
    "layer", [nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 6, 3, groups=2), nn.Linear(16, 5)], ids=str
)
def test_real_layers(layer: nn.Conv2d | nn.Linear) -> None:
    x = torch.randn(10, 16) if isinstance(layer, nn.Linear) else torch.randn(2, 8, 6, 6)
    moments = SecondMoments()
    moments.add(layer, x, product(layer, x))
    problem, weight = moments.problem(centred=True), flat(layer.weight)
    mask = torch.ones_like(weight, dtype=torch.bool)
    check(problem, mask, weight, rounded(problem, mask, weight))


@settings(max_examples=60)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=6))
def test_nearest_integers_are_within_half_a_step(row: list[float]) -> None:
    weight = torch.tensor([row], dtype=torch.float64)
    scale = row_scales(weight)
    error = (nearest(weight, scale).double() * scale[:, None] - weight).abs()
    assert (error <= scale * (0.5 + 1e-12)).all()
    assert not nearest(weight, scale)[weight == 0].any()


def test_a_row_of_zeros_gets_the_scale_of_its_neighbours() -> None:
    weight = torch.tensor([[0.0, 0.0], [127.0, 1.0], [254.0, 0.0], [381.0, 0.0]])
    assert row_scales(weight).tolist() == [2, 1, 2, 3]
    assert row_scales(torch.zeros(2, 3)).tolist() == [1, 1]
    assert row_scales(torch.zeros(2, 3), torch.tensor([0.5, 2.0])).tolist() == [1, 2]
    problem, _ = problem_of(4, 2)  # targets that are not zero
    result = rounded(problem, torch.ones(4, 2, dtype=torch.bool), weight)
    assert result.integers[0].tolist() == [0, 0]
    assert float(result.scale[0]) == 2
    nothing = rounded(problem, torch.zeros(4, 2, dtype=torch.bool), weight)
    assert not nothing.integers.any()
    assert nothing.scale.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_no_scale_is_below_the_floor(rule: LaneRule | None) -> None:
    problem, weight = problem_of(12, 16)
    mask, start, fitted = masked(problem, weight, PATTERNS[rule])
    free = rounded(fitted, mask, start, rule=rule).scale
    least = free * torch.linspace(0.5, 3, 12).double()
    result = rounded(fitted, mask, start, least=least, rule=rule)
    assert (result.scale >= least).all()
    assert rule is None or (reach(result.integers, rule) <= LIMIT).all()
    scale = row_scales(start, least, rule)
    plain = fitted.error(nearest(start, scale) * scale[:, None])
    assert (fitted.error(result.weight) <= plain + 1e-11 * fitted.power).all()
    assert float(rounded(fitted, mask, start, least=7.0, rule=rule).scale.min()) >= 7


def test_an_input_that_never_varies_keeps_its_weight() -> None:
    problem, weight = problem_of(8, 12)
    gram, cross = problem.gram.clone(), problem.cross.clone()
    gram[0, 5], gram[0, :, 5] = 0, 0
    cross[:, 5] = 1e-14  # rounding noise
    result = rounded(replace(problem, gram=gram, cross=cross), torch.ones_like(weight, dtype=torch.bool), weight)
    # Half a step, and 1 % of the weight where the search started from the larger scale.
    off = (result.weight - weight)[:, 5].abs()
    assert (off <= 0.55 * result.scale + 0.03 * weight[:, 5].abs()).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e39])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    problem, weight = problem_of(4, 8)
    mask = torch.ones_like(weight, dtype=torch.bool)
    weight[2, 3] = bad
    with pytest.raises(PassError, match=r"weights of 1 of 4 output channels are not finite .* --exclude the layer"):
        rounded(problem, mask, weight)
    with pytest.raises(PassError, match=r"bias of 4 of 4 output channels .* --exclude the layer"):
        rounded(problem, mask, torch.zeros_like(weight), least=bad)
    mask[2, 3] = False
    rounded(problem, mask, weight)  # it is not kept
