"""Densities and the integer program: against counting by hand and against trying every choice."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpcompile.ir.pattern import NM
from mpcompile.passes.mp_budget.allocate import InfeasibleError, Option, damage, densities, least_damage
from mpcompile.passes.nm_mask.selection import nm_mask


@given(st.floats(0.0, 1.0), st.integers(0, 100))
def test_densities_keep_the_largest_of_all(density: float, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(shape, generator=rng) for name, shape in (("a", (8, 12)), ("b", (5, 7, 3, 3)))}
    kept = round(density * (96 + 315))
    ranked = sorted(((float(v), name) for name, s in scores.items() for v in s.flatten()), reverse=True)[:kept]
    expected = {name: sum(other == name for _, other in ranked) / scores[name].numel() for name in scores}
    assert densities(scores, density) == pytest.approx(expected)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(5, 8), NM(2, 4, rows=2)])
def test_damage_is_what_the_best_mask_removes(pattern: NM) -> None:
    score = torch.rand(8, 16, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # With squares for scores the mask pass keeps the most of what damage counts.
    mask = nm_mask(score.square(), pattern)
    assert damage(score, pattern) == pytest.approx(float(score[~mask].square().sum()), rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.floats(0.05, 1.0))
def test_the_program_finds_the_least_of_all_choices(seed: int, units: int, share: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    patterns = [NM(1, 4), NM(2, 4), NM(3, 4)]
    options = []
    for unit in range(units):
        macs = float(torch.rand(1, generator=rng)) + 0.1
        for p in patterns:
            cost = float(torch.rand(1, generator=rng)) * (1 - p.density)
            options.append(Option((f"layer{unit}",), p, cost, macs * (1 - p.density)))
    saving = share * sum(o.saving for o in options if o.pattern == NM(1, 4))
    found = least_damage(options, saving)
    assert len({o.layers for o in found}) == len(found)
    # HiGHS meets constraints to 1e-6 of their scale.
    assert sum(o.saving for o in found) >= saving * (1 - 1e-6)
    choices = itertools.product(*[[None, *options[3 * u : 3 * u + 3]] for u in range(units)])
    feasible = [[o for o in c if o] for c in choices if sum(o.saving for o in c if o) >= saving * (1 - 1e-9)]
    best = min(sum(o.damage for o in c) for c in feasible)
    # With damages scaled to at most 1, HiGHS stops within 1e-6 of the optimum, and a variable that is within 1e-6 of an
    # integer counts as one.
    tolerance = 1e-6 * (1 + len(options)) * max(o.damage for o in options)
    assert sum(o.damage for o in found) <= best + tolerance


def test_what_cannot_be_saved_is_told() -> None:
    options = [
        Option(("a",), NM(2, 4), 1.0, 5.0),
        Option(("a",), NM(1, 4), 2.0, 7.5),
        Option(("b",), NM(2, 4), 1.0, 1.0),
    ]
    with pytest.raises(InfeasibleError) as error:
        least_damage(options, 9.0)
    assert error.value.most == 8.5
    assert {o.pattern for o in least_damage(options, 8.5)} == {NM(1, 4), NM(2, 4)}


def test_a_hundred_layers_take_no_time() -> None:
    rng = torch.Generator().manual_seed(0)
    options = [
        Option((f"l{i}",), NM(k, 8), float(torch.rand(1, generator=rng)) * (8 - k) ** 2, (8 - k) / 8 * (1 + i % 5))
        for i in range(100)
        for k in range(1, 8)
    ]
    found = least_damage(options, 120.0)
    assert sum(o.saving for o in found) == pytest.approx(120.0, rel=0.02)
