"""The strength of a refit: what is predictable is corrected in full, chance hardly, and other images gain from it."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mpcompile.passes.reconstruct.cross_validation import DAMPINGS, Strength, chosen_strength
from mpcompile.passes.reconstruct.second_moments import SecondMoments

ROWS, INPUTS, OUTPUTS = 400, 8, 3


def parts_of(layer: nn.Linear, x: Tensor, *targets: Tensor, parts: int = 2) -> tuple[SecondMoments, ...]:
    """Moments of every second (third …) row."""
    found = tuple(SecondMoments() for _ in range(parts))
    for index, part in enumerate(found):
        part.add(layer, x[index::parts], *(target[index::parts] for target in targets))
    return found


def chosen(parts: tuple[SecondMoments, ...], weight: Tensor, centred: bool, dampings: tuple[float, ...]) -> Strength:
    return chosen_strength(sum(parts, SecondMoments()), parts, weight, centred, dampings)


def strength_of(layer: nn.Linear, x: Tensor, *targets: Tensor, dampings: tuple[float, ...] = (1e-6,)) -> Strength:
    return chosen(parts_of(layer, x, *targets), layer.weight.detach(), True, dampings)


@torch.no_grad()
def test_shares_are_high_for_predictable_errors_and_low_for_chance() -> None:
    rng = torch.Generator().manual_seed(0)
    layer = nn.Linear(INPUTS, OUTPUTS)
    x = torch.randn(ROWS, INPUTS, generator=rng)
    y = layer(x)
    predictable = x @ torch.randn(INPUTS, OUTPUTS, generator=rng)
    chance = torch.randn(ROWS, OUTPUTS, generator=rng) * predictable.std()
    # There is no noise in the first; of 200 rows and 8 inputs, what is fitted to chance is worth nothing elsewhere.
    assert strength_of(layer, x, y + predictable).dense == pytest.approx(1, abs=1e-4)
    assert strength_of(layer, x, y + chance).dense < 0.6
    assert strength_of(layer, x, y, predictable).residual == pytest.approx(1, abs=1e-4)
    assert strength_of(layer, x, y, chance).residual < 0.6
    both = strength_of(layer, x, y + predictable, chance)
    assert both.dense > 0.95
    assert both.residual < 0.6
    few = strength_of(layer, x[:24], y[:24], chance[:24])
    assert few.residual < 0.3


@torch.no_grad()
def test_a_strong_damping_is_chosen_where_inputs_are_many_and_rows_few() -> None:
    rng = torch.Generator().manual_seed(0)
    layer = nn.Linear(64, 4)
    clean = torch.randn(8000, 64, generator=rng) / torch.arange(1, 65)  # some inputs vary much more than others
    wrong = layer(clean) + clean[:, :4]
    noisy = wrong[:160] + 0.2 * torch.randn(160, 4, generator=rng)
    assert strength_of(layer, clean[:160], noisy, dampings=DAMPINGS).damping == DAMPINGS[-1]
    assert strength_of(layer, clean, wrong, dampings=DAMPINGS).damping == DAMPINGS[0]


@given(
    st.integers(0, 10_000),
    st.booleans(),
    st.floats(0, 2),
    st.floats(0, 2),
    st.integers(2, 4),
    st.sampled_from(DAMPINGS),
)
@settings(max_examples=40)
def test_the_shares_minimize_the_error_on_the_parts_left_out(
    seed: int, centred: bool, wrong: float, scale: float, parts: int, damping: float
) -> None:
    rng = torch.Generator().manual_seed(seed)
    layer = nn.Linear(INPUTS, OUTPUTS)
    x, noise = torch.randn(60, INPUTS, generator=rng) + 0.5, torch.randn(2, 60, OUTPUTS, generator=rng)
    weight = layer.weight.detach()
    y = x @ weight.T + wrong * noise[0]
    more = scale * (noise[1] + x[:, :OUTPUTS])
    moments = parts_of(layer, x, y, more, parts=parts)
    strength = chosen(moments, weight, centred, (damping,))

    def error(dense: float, residual: float) -> float:
        """Σ E‖y + Δ − (W + η_y D_y + η_Δ D_Δ)x‖² over the parts left out, in NumPy."""
        total = 0.0
        own = weight.double().numpy()
        for index in range(parts):
            left_out = np.arange(60) % parts == index
            a, b, c = (t.double().numpy()[~left_out] for t in (x, y, more))
            rows, target = x.double().numpy()[left_out], (y + more).double().numpy()[left_out]
            if centred:
                a, b, c = (t - t.mean(0) for t in (a, b, c))
                rows, target = rows - rows.mean(0), target - target.mean(0)
            gram = a.T @ a / len(a)
            ridge = gram + damping * gram.trace() / INPUTS * np.eye(INPUTS)
            d_y = np.linalg.solve(ridge, a.T @ (b - a @ own.T) / len(a)).T
            d_more = np.linalg.solve(ridge, a.T @ c / len(a)).T
            total += np.square(target - rows @ (own + dense * d_y + residual * d_more).T).mean(0).sum()
        return total

    assert 0 <= strength.dense <= 1
    assert 0 <= strength.residual <= 1
    best = error(strength.dense, strength.residual)
    for dense in (0.0, 0.3, 0.6, 1.0):
        for residual in (0.0, 0.3, 0.6, 1.0):
            # Moments are sums of float32 products; 1e-4 of the target's power is far below any difference that counts.
            assert best <= error(dense, residual) + 1e-4 * float((y + more).square().mean() + 1e-9)


def test_without_two_parts_nothing_is_chosen() -> None:
    layer = nn.Linear(INPUTS, OUTPUTS)
    [half] = parts_of(layer, torch.randn(9, INPUTS), torch.randn(9, OUTPUTS), torch.randn(9, OUTPUTS), parts=1)
    assert chosen((half, SecondMoments()), layer.weight.detach(), True, DAMPINGS) == Strength(DAMPINGS[0])
    assert chosen((), layer.weight.detach(), True, (0.5,)) == Strength(0.5, 1.0, 0.0)


@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=20)
def test_constant_inputs_and_targets_give_finite_shares(seed: int, centred: bool) -> None:
    assume(seed)
    layer = nn.Linear(INPUTS, OUTPUTS)
    x = torch.full((40, INPUTS), float(seed % 3))
    strength = chosen(
        parts_of(layer, x, torch.zeros(40, OUTPUTS), torch.zeros(40, OUTPUTS)), layer.weight.detach(), centred, DAMPINGS
    )
    assert 0 <= strength.dense <= 1
    assert 0 <= strength.residual <= 1
