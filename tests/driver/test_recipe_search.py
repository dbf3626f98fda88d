"""The search of `tune` without a model: which recipes are tried, which one is chosen, and ties in speed."""

import math
from collections.abc import Sequence
from dataclasses import replace as with_fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpcompile.driver.recipe_search import (
    STEPS,
    Candidate,
    StrengthPath,
    fastest,
    paths_of,
    search,
    weaker,
    within_limit,
)
from mpcompile.errors import UsageError
from mpcompile.measure.timing import Speedup
from mpcompile.recipe.schema import Recipe, Step
from mpcompile.report.search_schema import Point, Tuning
from mpcompile.report.sentences import searched


def recipe_of(passes: Sequence[object], **more: object) -> Recipe:
    return Recipe.checked({"passes": list(passes), **more})


def numbered_path(name: str = "path") -> StrengthPath:
    """A path whose recipes differ in a parameter that is not used."""
    return StrengthPath(name, lambda step: Candidate(f"{name} {step}", recipe_of([{"x": {name: step}}])))


@given(st.integers(0, STEPS))
def test_bisection_finds_the_strongest_recipe_within_the_limit(limit: int) -> None:
    evaluated = []

    def evaluate(candidate: Candidate) -> Point:
        step = int(candidate.name.split()[1])
        evaluated.append(step)
        return Point(candidate.name, 1 / (1 + step), 0.0, 0.0, holds=step <= limit)

    tried = search([numbered_path()], evaluate, allowed=100)
    assert evaluated[0] == STEPS  # the recipe as written is evaluated first
    assert len(evaluated) <= 1 + math.log2(STEPS)
    best = [point for _, point in tried if point.holds]
    if limit:
        assert max(best, key=lambda point: point.speed).name == f"path {limit}"
        assert fastest(tried)[1].name == f"path {limit}"
    else:
        assert not best


@given(st.integers(1, 12), st.integers(1, 4))
def test_at_most_the_allowed_recipes_are_tried_and_each_once(allowed: int, paths: int) -> None:
    def evaluate(candidate: Candidate) -> Point:
        return Point(candidate.name, 0.5, 9.0, 0.0)

    tried = search(
        [numbered_path(f"path{n}") for n in range(paths)], evaluate, allowed, [Candidate("a", recipe_of(["x"]))]
    )
    names = [candidate.name for candidate, _ in tried]
    assert names[0] == "a"
    assert len(names) == len(set(names)) == min(allowed, 1 + paths * 4)
    # Paths are evaluated in turn: their counts differ by one at most.
    counts = [sum(name.startswith(f"path{n} ") for name in names) for n in range(paths)]
    assert max(counts) - min(counts) <= 1


def test_a_recipe_on_two_paths_is_tried_once() -> None:
    hashes = []

    def evaluate(candidate: Candidate) -> Point:
        hashes.append(candidate.recipe.sha256)
        return Point(candidate.name, 0.5, 9.0, 0.0)

    search([numbered_path("same"), numbered_path("same")], evaluate, 100)
    assert len(hashes) == len(set(hashes)) == 4


def test_the_fastest_is_chosen_by_time_or_without_times_by_macs() -> None:
    def candidate(name: str) -> Candidate:
        return Candidate(name, recipe_of([name]))

    def speed(*ratios: float) -> tuple[Speedup, ...]:
        return tuple(Speedup(ratio, (ratio, ratio), 15, "dense") for ratio in ratios)

    timed = [
        (candidate("a"), Point("a", 0.5, 0.1, 0.0, speed(1.0, 1.44), True)),
        (candidate("b"), Point("b", 0.6, 0.1, 0.0, speed(1.5, 1.5), True)),
        (candidate("c"), Point("c", 0.4, 3.0, 0.0, speed(3.0, 3.0), False)),
    ]
    assert timed[0][1].speed == pytest.approx(1.2)
    assert fastest(timed)[1].name == "b"
    untimed = [
        (candidate("a"), Point("a", 0.5, 0.1, 0.0, (), True)),
        (candidate("b"), Point("b", 0.6, 0.1, 0.0, (), True)),
    ]
    assert fastest(untimed)[1].name == "a"
    none = [timed[2], (candidate("d"), Point("d", 0.9, 1.5, 0.0, speed(1.1), False))]
    assert fastest(none)[1].name == "d"  # the smallest drop
    with pytest.raises(UsageError, match="none of the 1 recipes tried made a model: no layer takes 3:5"):
        fastest([(candidate("a"), Point("a", failed="no layer takes 3:5"))])


def test_the_limit_applies_to_drop_plus_standard_error() -> None:
    assert within_limit(0.5, 0.5, 1.0)
    assert not within_limit(0.6, 0.5, 1.0)
    assert within_limit(-2.0, 0.4, 0.0)


# ---- paths of a recipe


def test_each_pattern_of_a_budget_has_its_own_paths() -> None:
    recipe = recipe_of([{"mp-budget": {"patterns": ["1:4", "2:4"]}}, "nm-mask", {"tome": {"r": 8}}])
    paths = paths_of(recipe, lambda given: 0.4)
    assert [path.name for path in paths] == [
        f"{pattern}, {what}" for pattern in ("1:4", "2:4") for what in ("masks", "tokens", "masks and tokens")
    ]
    full = paths[0].at(STEPS)
    assert full.name == "1:4, as written"
    assert full.recipe.step("mp-budget") == Step(name="mp-budget", params={"patterns": ["1:4"]})
    assert full.recipe == paths[1].at(STEPS).recipe == paths[2].at(STEPS).recipe
    half = paths[2].at(STEPS // 2)
    assert half.name == "1:4, MACs 0.70, tokens 4/8"
    assert half.recipe.step("mp-budget") == Step(name="mp-budget", params={"patterns": ["1:4"], "macs": 0.7})
    assert half.recipe.step("tome") == Step(name="tome", params={"r": 4})


def test_a_budget_with_macs_starts_at_that_share_and_keeps_its_patterns_mixed() -> None:
    recipe = recipe_of([{"mp-budget": {"patterns": ["1:4", "2:4"], "macs": 0.6}}, "nm-mask"])
    [path] = paths_of(recipe, lambda given: 0.6)
    assert path.at(STEPS).recipe == recipe
    assert path.at(4).recipe.step("mp-budget") == Step(
        name="mp-budget", params={"patterns": ["1:4", "2:4"], "macs": 0.8}
    )


@pytest.mark.parametrize(
    ("params", "half"),
    [
        ({"r": 8}, {"r": 4}),
        ({}, {"r": 4}),
        ({"r": "7:decreasing"}, {"r": "3:decreasing"}),
        ({"r": "0,2,9"}, {"r": [0, 1, 4]}),
        ({"r": [0, 2, 9]}, {"r": [0, 1, 4]}),
        ({"r": "auto", "macs": 0.6}, {"macs": 0.8}),
    ],
)
def test_token_merging_at_half_strength(params: dict[str, object], half: dict[str, object]) -> None:
    assert weaker(Step(name="tome", params=params), 0.5) == half


def test_a_recipe_without_budget_or_token_merging_is_refused() -> None:
    with pytest.raises(UsageError, match="nothing to search over; give it a budget"):
        paths_of(recipe_of([{"nm-mask": {"pattern": "2:4"}}]), lambda given: 0.5)


def point_of(name: str, *intervals: tuple[float, float], holds: bool = True) -> Point:
    speedups = tuple(Speedup((low + high) / 2, (low, high), 20, "dense") for low, high in intervals)
    return Point(name, 0.5, 0.1, 0.1, speedups, holds)


def test_recipes_as_fast_as_the_chosen_one_within_the_intervals_are_named() -> None:
    points = (
        point_of("taken", (1.4, 1.6), (1.5, 1.7)),
        point_of("as fast", (1.3, 1.7), (1.4, 1.6)),
        point_of("slower", (1.0, 1.2), (1.1, 1.2)),
        point_of("as fast and beyond the limit", (1.4, 1.6), (1.5, 1.7), holds=False),
    )
    found = Tuning(1.0, 4, 64, (1, 8), points, "taken")
    assert points[0].speed_interval == pytest.approx((math.sqrt(1.4 * 1.5), math.sqrt(1.6 * 1.7)))
    assert found.as_fast() == ("as fast",)
    said = "The speed of as fast does not differ significantly from that of the chosen recipe: another run may choose"
    assert said in searched(found)
    assert said not in searched(with_fields(found, points=(points[0], points[2])))


def test_without_timing_the_speed_comes_from_macs_and_has_no_interval() -> None:
    points = (Point("taken", 0.5, 0.1, 0.1, (), True), Point("same", 0.5, 0.1, 0.1, (), True))
    assert points[0].speed_interval == (2.0, 2.0)
    assert Tuning(1.0, 4, 64, (), points, "taken").as_fast() == ()
