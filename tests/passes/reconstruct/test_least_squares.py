"""Least squares on a support, against independent float64 solves; the residual share by cross-validation."""

from itertools import cycle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mpcompile.ir.pattern import NM
from mpcompile.ir.weight_groups import flat, unflat
from mpcompile.passes.nm_mask.selection import nm_mask
from mpcompile.passes.reconstruct import least_squares
from mpcompile.passes.reconstruct.layer_rows import columns, product, rows_of
from mpcompile.passes.reconstruct.least_squares import damped, of_layer, refit, unconstrained
from mpcompile.passes.reconstruct.second_moments import LeastSquares, SecondMoments

LAYERS = (
    nn.Linear(12, 8),
    nn.Conv2d(8, 8, 1),
    nn.Conv2d(8, 4, 3, padding=1, stride=2),
    nn.Conv2d(8, 8, (1, 3), padding=(0, 1), dilation=(1, 1), groups=2, bias=False),
    nn.Conv2d(4, 8, 3, padding="same", padding_mode="circular"),
)


def inputs_of(layer: nn.Linear | nn.Conv2d, seed: int = 0, images: int = 6) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    if isinstance(layer, nn.Linear):
        return torch.randn(images, 5, layer.in_features, generator=rng) + 3
    return torch.randn(images, layer.in_channels, 6, 6, generator=rng) + 3


def moments_of(layer: nn.Linear | nn.Conv2d, x: Tensor, y: Tensor) -> SecondMoments:
    moments = SecondMoments()
    for start in range(0, len(x), 2):  # in batches
        moments.add(layer, x[start : start + 2], rows_of(layer, y[start : start + 2]))
    return moments


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@torch.no_grad()
def test_columns_times_weights_are_the_layers_outputs(layer: nn.Linear | nn.Conv2d) -> None:
    x = inputs_of(layer)
    bias = 0 if layer.bias is None else layer.bias
    # float32 sums of some 70 products in another order.
    torch.testing.assert_close(product(layer, x) + bias, rows_of(layer, layer(x)), rtol=1e-5, atol=1e-5)
    assert torch.equal(unflat(flat(layer.weight), layer.weight.shape), layer.weight)


@torch.no_grad()
def test_columns_pad_as_timms_same_convolutions_do() -> None:
    from timm.layers.conv2d_same import Conv2dSame

    layer = Conv2dSame(4, 4, 3, stride=2)
    x = torch.randn(2, 4, 7, 8)
    torch.testing.assert_close(product(layer, x) + layer.bias, rows_of(layer, layer(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("centred", [True, False])
@torch.no_grad()
def test_moments_are_those_of_all_rows_in_float64(layer: nn.Linear | nn.Conv2d, centred: bool) -> None:
    x = inputs_of(layer)
    y = layer(x) + 1
    problem = moments_of(layer, x, y).problem(centred)
    rows, wanted = columns(layer, x).double(), rows_of(layer, y).double()
    assert problem.count == len(wanted)
    if centred:
        rows, wanted = rows - rows.mean(1, keepdim=True), wanted - wanted.mean(0)
    by_group = wanted.reshape(len(wanted), len(rows), -1).movedim(1, 0)
    # Each product is float32 of centred values, so seven digits of the largest entry.
    size = float(rows.square().mean())
    torch.testing.assert_close(problem.gram, rows.mT @ rows / rows.shape[1], rtol=1e-5, atol=1e-5 * size)
    torch.testing.assert_close(
        problem.cross, (by_group.mT @ rows / rows.shape[1]).flatten(0, 1), rtol=1e-5, atol=1e-5 * size
    )
    torch.testing.assert_close(problem.power, wanted.square().mean(0), rtol=1e-5, atol=1e-5 * size)


@st.composite
def problems(draw: st.DrawFn) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """A Linear, inputs of any rank with some constant channels, noisy targets, and a mask."""
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    of = draw(st.sampled_from((2, 4, 8)))
    rows = draw(st.sampled_from((1, 2)))
    width, out = of * draw(st.integers(1, 4)), rows * draw(st.integers(1, 6))
    count = draw(st.integers(1, 40))
    layer = nn.Linear(width, out)
    x = torch.randn(count, width, generator=rng) @ torch.randn(width, width, generator=rng)
    x[:, : draw(st.integers(0, 2))] = draw(st.sampled_from((0.0, 2.0)))
    y = F.linear(x, layer.weight.detach(), layer.bias.detach()) + 0.3 * torch.randn(count, out, generator=rng)
    pattern = NM(draw(st.integers(1, of - 1)), of, rows)
    mask = nm_mask(torch.rand(out, width, generator=rng), pattern)
    return layer, x, y, mask


def damped_problem(layer: nn.Linear, x: Tensor, y: Tensor, damping: float = 1e-2) -> LeastSquares:
    """The problem about the means, with the ridge term towards the layer's own weights."""
    moments = SecondMoments()
    moments.add(layer, x, y)
    return damped(moments.problem(centred=True), layer.weight.detach(), damping)


@given(problems(), st.sampled_from((1e-3, 1e-2, 1.0)))
@settings(max_examples=60)
def test_refit_equals_a_dense_float64_solve(case: tuple[nn.Linear, Tensor, Tensor, Tensor], damping: float) -> None:
    layer, x, y, mask = case
    problem = damped_problem(layer, x, y, damping)
    found = refit(problem, mask)
    gram, cross = problem.gram[0].numpy(), problem.cross.numpy()
    for row, kept in enumerate(mask.numpy()):
        wanted = np.zeros(len(kept))
        if kept.any():
            wanted[kept] = np.linalg.solve(gram[np.ix_(kept, kept)], cross[row, kept])
        # Refined until the last correction is below 1e-8; the condition is at most some 1e4 here.
        np.testing.assert_allclose(found[row].numpy(), wanted, rtol=1e-6, atol=1e-6 * max(abs(wanted).max(), 1e-9))
    assert not bool(found[~mask].any())


@given(problems())
@settings(max_examples=60)
def test_refit_never_has_a_higher_objective_than_the_masked_weights(
    case: tuple[nn.Linear, Tensor, Tensor, Tensor],
) -> None:
    layer, x, y, mask = case
    weight, problem = layer.weight.detach(), damped_problem(layer, x, y)
    before, after = problem.error(torch.where(mask, weight, 0)), problem.error(refit(problem, mask))
    assert bool((after <= before + 1e-6 * problem.power).all())


@given(problems())
@settings(max_examples=30)
def test_a_full_support_gives_the_layers_own_weights(case: tuple[nn.Linear, Tensor, Tensor, Tensor]) -> None:
    layer, x, y, mask = case
    moments = SecondMoments()
    moments.add(layer, x, y)
    weight = layer.weight.detach()
    own = of_layer(moments.problem(centred=True), weight, layer.bias.detach())
    problem = damped(own, weight, 1e-2)
    for found in (refit(problem, torch.ones_like(mask)), unconstrained(problem)):
        torch.testing.assert_close(found.float(), weight, rtol=1e-4, atol=1e-5)
    # The moments are of float32 products, and so is the mean that the bias is made of.
    torch.testing.assert_close(own.bias(weight), layer.bias.detach().double(), rtol=1e-4, atol=1e-4)


def test_constant_inputs_keep_their_weights() -> None:
    layer = nn.Linear(8, 4)
    mask = nm_mask(layer.weight.detach().abs(), NM(2, 4))
    found = refit(damped_problem(layer, torch.zeros(5, 8), torch.zeros(5, 4)), mask)
    torch.testing.assert_close(found.float(), torch.where(mask, layer.weight.detach(), 0))


def test_an_ill_conditioned_second_moment_is_solved_in_float64() -> None:
    rng = torch.Generator().manual_seed(0)
    base = torch.randn(400, 8, generator=rng)
    x = torch.cat([base, base + 1e-3 * torch.randn(400, 8, generator=rng)], 1)
    layer = nn.Linear(16, 3)
    moments = SecondMoments()
    moments.add(layer, x, F.linear(x, layer.weight.detach()))
    problem = damped(moments.problem(centred=False), layer.weight.detach(), 1e-11)
    mask = torch.ones(3, 16, dtype=torch.bool)
    wanted = torch.linalg.solve(problem.gram[0], problem.cross.mT).mT
    # The condition is about 1e7, more than float32 factors carry.
    torch.testing.assert_close(refit(problem, mask), wanted, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_convolution_is_the_linear_layer_on_its_unfolded_inputs() -> None:
    conv = nn.Conv2d(8, 4, 3, padding=1, bias=False)
    linear = nn.Linear(72, 4, bias=False)
    linear.weight.copy_(flat(conv.weight))
    x = inputs_of(conv)
    y = conv(x) + torch.randn(6, 4, 6, 6)
    mask = nm_mask(conv.weight.abs(), NM(2, 4))
    assert torch.equal(flat(mask), nm_mask(linear.weight.abs(), NM(2, 4)))
    of_conv = damped(moments_of(conv, x, y).problem(True), flat(conv.weight), 1e-2)
    moments = SecondMoments()
    moments.add(linear, columns(conv, x)[0], rows_of(conv, y))
    of_linear = damped(moments.problem(True), linear.weight, 1e-2)
    # The same products in chunks of another size: float32 rounding, times the condition.
    torch.testing.assert_close(refit(of_conv, flat(mask)), refit(of_linear, flat(mask)), rtol=1e-3, atol=1e-4)


def problem_values(problem: LeastSquares) -> list[Tensor]:
    return [problem.gram, problem.cross, problem.power, problem.mean_x, problem.mean_y]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("centred", [True, False])
@torch.no_grad()
def test_moments_of_parts_add_up(layer: nn.Linear | nn.Conv2d, centred: bool) -> None:
    x = inputs_of(layer)
    y = torch.randn_like(layer(x)) + 2
    whole, parts = moments_of(layer, x, y), moments_of(layer, x[:2], y[:2]) + moments_of(layer, x[2:], y[2:])
    for one, other in zip(problem_values(whole.problem(centred)), problem_values(parts.problem(centred)), strict=True):
        # Products of a batch are float32, of values less a shift that differs.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert (SecondMoments() + whole) is whole
    assert (whole + SecondMoments()) is whole


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("centred", [True, False])
@torch.no_grad()
def test_combined_targets_equal_the_target_of_their_sum(layer: nn.Linear | nn.Conv2d, centred: bool) -> None:
    x = inputs_of(layer)
    y, more = rows_of(layer, torch.randn_like(layer(x)) + 2), rows_of(layer, torch.randn_like(layer(x)) - 1)
    share = torch.rand(2, y.shape[1])
    both, sum_of_both = SecondMoments(), SecondMoments()
    both.add(layer, x, y, more)
    sum_of_both.add(layer, x, share[0] * y + share[1] * more)
    found, wanted = both.combined(share).problem(centred), sum_of_both.problem(centred)
    for one, other in zip(problem_values(found), problem_values(wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)  # float32, as above


@pytest.mark.parametrize("columns", [37, 74, 100, 383])
@pytest.mark.parametrize("pattern", ["2:4", "rows"])
@pytest.mark.parametrize("found", [(0.0, 1.0, 1.0, 0.0), (1.0,)], ids=["float32 factors", "float64 factors"])
def test_a_row_has_the_same_bits_whichever_rows_are_solved_with_it(
    columns: int, pattern: str, found: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process group each rank solves for its own supports: weights must not depend on which these are.

    `found` is what the ranks agree on: whether factors failed, then the largest correction of each refinement.
    """
    agreed = cycle(found)
    monkeypatch.setattr(least_squares, "largest_of_all", lambda own: next(agreed))
    rng = torch.Generator().manual_seed(columns)
    x = torch.randn(4 * columns, columns, dtype=torch.float64, generator=rng)
    gram, rows = x.mT @ x / len(x), 24
    cross = torch.randn(rows, columns, dtype=torch.float64, generator=rng)
    if pattern == "rows":  # as many weights in each row, anywhere
        order = torch.rand(rows, columns, generator=rng).argsort(1)
        mask = order < columns // 2
    else:
        kept = torch.rand(rows, columns // 4 + 1, 4, generator=rng).argsort(-1) < 2
        mask = kept.flatten(1)[:, :columns]
        mask[:, 4 * (columns // 4) :] = False
    zeros = torch.zeros(rows, dtype=torch.float64)
    problem = LeastSquares(gram[None], cross, zeros, torch.zeros(1, columns, dtype=torch.float64), zeros, len(x))
    whole = refit(problem, mask)
    for ranks in (2, 3, 4):
        for rank in range(ranks):
            own = slice(rank, None, ranks)
            part = LeastSquares(gram[None], cross[own], zeros[own], problem.mean_x, zeros[own], len(x))
            assert torch.equal(refit(part, mask[own]), whole[own])
