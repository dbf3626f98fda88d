"""Criteria covariance and joint: valid patterns, lower cost than Wanda, close to the best of all, the prior."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpcompile.ir.pattern import NM
from mpcompile.ir.weight_groups import pattern_violation
from mpcompile.passes.nm_mask.criteria.covariance import removal_cost, swapped
from mpcompile.passes.nm_mask.criteria.joint import joint_support
from mpcompile.passes.nm_mask.selection import largest, nm_mask
from mpcompile.passes.reconstruct.least_squares import refit
from mpcompile.passes.reconstruct.second_moments import LeastSquares


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, NM]:
    """Weights, positive definite second moments of one or two groups, and a pattern."""
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    of, rows = draw(st.sampled_from((2, 3, 4, 8, 16, 64))), draw(st.sampled_from((1, 2, 4)))
    groups = draw(st.sampled_from((1, 2)))
    width = of * draw(st.integers(1, 2))
    weight = torch.randn(groups * rows * draw(st.integers(1, 3)), width, generator=rng)
    x = torch.randn(groups, 50, width, generator=rng, dtype=torch.float64)
    x = x @ torch.randn(groups, width, width, generator=rng, dtype=torch.float64) + 1
    return weight, x.mT @ x / 50 + 0.01 * torch.eye(width), NM(draw(st.integers(1, of - 1)), of, rows)


def wanda(weight: Tensor, gram: Tensor, pattern: NM) -> Tensor:
    power = gram.diagonal(dim1=-2, dim2=-1).repeat_interleave(len(weight) // len(gram), 0)
    return nm_mask(weight.double().square() * power, pattern)


@given(cases())
@settings(max_examples=80)
def test_swaps_never_cost_more_than_wanda_and_keep_the_pattern(case: tuple[Tensor, Tensor, NM]) -> None:
    weight, gram, pattern = case
    start = wanda(weight, gram, pattern)
    mask = swapped(weight, gram, start, pattern)
    assert pattern_violation(mask, pattern) is None
    assert int(mask.sum()) == int(start.sum())
    before, after = (float(removal_cost(weight, gram, m, pattern)) for m in (start, mask))
    assert after <= before * (1 + 1e-9)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), NM(2, 4, rows=2)], ids=str)
def test_cost_after_swaps_is_close_to_the_best_of_all_patterns(pattern: NM) -> None:
    rng = torch.Generator().manual_seed(1)
    weight = torch.randn(64, 2 * pattern.of, generator=rng)
    x = torch.randn(200, weight.shape[1], generator=rng, dtype=torch.float64)
    gram = (x @ torch.randn(len(x.T), len(x.T), generator=rng, dtype=torch.float64) + 1)[None]
    gram = gram.mT @ gram / 200
    cost = removal_cost(weight, gram, swapped(weight, gram, wanda(weight, gram, pattern), pattern), pattern)
    choices = list(itertools.combinations(range(pattern.of), pattern.keep))
    best = 0.0
    for block, group in itertools.product(range(0, 64, pattern.rows), range(2)):
        at = slice(group * pattern.of, (group + 1) * pattern.of)
        u, c = weight[block : block + pattern.rows, at].double(), gram[0, at, at]
        costs = []
        for kept in choices:
            r = u.clone()
            r[:, list(kept)] = 0
            costs.append(float(((r @ c) * r).sum()))
        best += min(costs)
    assert best * (1 - 1e-9) <= float(cost) <= 1.03 * best  # summed over 64 or 128 groups


def test_a_strong_prior_gives_the_source_mask_if_it_follows_the_pattern() -> None:
    weight = torch.randn(8, 16)
    gram = torch.eye(16, dtype=torch.float64)[None] + 0.5
    source = nm_mask(torch.rand(8, 16), NM(2, 4))
    start = wanda(weight, gram, NM(2, 4))
    assert torch.equal(swapped(weight, gram, start, NM(2, 4), prior=1e6, source=source), source)
    assert torch.equal(
        swapped(weight, gram, start, NM(2, 4), prior=0.0, source=source), swapped(weight, gram, start, NM(2, 4))
    )


def test_the_largest_weights_are_a_share_of_all() -> None:
    weight = torch.randn(10, 10)
    mask = largest(weight, 0.65)
    assert int(mask.sum()) == 65
    assert float(weight.abs()[mask].min()) >= float(weight.abs()[~mask].max())


@given(cases())
@settings(max_examples=40)
def test_joint_supports_follow_the_pattern(case: tuple[Tensor, Tensor, NM]) -> None:
    weight, gram, pattern = case
    mask = joint_support(weight.double(), gram, pattern)
    assert pattern_violation(mask, pattern) is None


def test_joint_supports_have_a_lower_error_after_the_refit() -> None:
    """Summed over a layer with correlated inputs; in a single row either criterion may be better."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(500, 64, generator=rng, dtype=torch.float64)
    x = x @ torch.randn(64, 64, generator=rng, dtype=torch.float64) + x.sum(1, keepdim=True)
    gram = (x.mT @ x / 500)[None]
    weight = torch.randn(96, 64, generator=rng, dtype=torch.float64)
    cross = weight @ gram[0]
    problem = LeastSquares(gram, cross, (cross * weight).sum(1), torch.zeros(1, 64), torch.zeros(96), 500)
    pattern = NM(2, 4)
    masks = {
        "wanda": wanda(weight, gram, pattern),
        "joint": joint_support(weight, gram, pattern),
    }
    errors = {name: float(problem.error(refit(problem, mask)).sum()) for name, mask in masks.items()}
    assert errors["joint"] < 0.9 * errors["wanda"]
