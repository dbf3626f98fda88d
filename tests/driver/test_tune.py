"""The tuning loop: which recipes are tried, which is taken, and what is told of them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace as with_fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kept_exports import keep_exports
from numpy.typing import NDArray
from sparse_vit import write_sparse_vit

import mpcompile
from mpcompile.driver import tune
from mpcompile.driver.artifact import Artifact
from mpcompile.driver.recipe_search import STEPS, Candidate, fastest, held, paths_of, search, weaker
from mpcompile.errors import AccuracyError, UsageError
from mpcompile.measure.timing import Speedup
from mpcompile.recipe.schema import Recipe, Step
from mpcompile.report import search_chart as tuning_chart
from mpcompile.report.sentences import searched
from mpcompile.runtimes import Engine

from mpcompile.report.search_schema import Point, Tuning  # isort: skip
from mpcompile.driver.recipe_search import StrengthPath


def recipe_of(passes: Sequence[object], **more: object) -> Recipe:
    return Recipe.checked({"passes": list(passes), **more})


def numbered(name: str = "path") -> StrengthPath:
    """A path whose recipes differ in a parameter that nothing reads."""
    return StrengthPath(name, lambda place: Candidate(f"{name} {place}", recipe_of([{"x": {name: place}}])))


# ---- the search


@given(st.integers(0, STEPS))
def test_halving_finds_the_strongest_that_holds(limit: int) -> None:
    asked = []

    def evaluate(candidate: Candidate) -> Point:
        place = int(candidate.name.split()[1])
        asked.append(place)
        return Point(candidate.name, 1 / (1 + place), 0.0, 0.0, holds=place <= limit)

    tried = search([numbered()], evaluate, allowed=100)
    assert asked[0] == STEPS  # the recipe as it was written comes first
    assert len(asked) <= 1 + math.log2(STEPS)
    best = [point for _, point in tried if point.holds]
    if limit:
        assert max(best, key=lambda point: point.speed).name == f"path {limit}"
        assert fastest(tried)[1].name == f"path {limit}"
    else:
        assert not best


@given(st.integers(1, 12), st.integers(1, 4))
def test_no_more_recipes_are_tried_than_allowed_and_none_twice(allowed: int, paths: int) -> None:
    def evaluate(candidate: Candidate) -> Point:
        return Point(candidate.name, 0.5, 9.0, 0.0)

    tried = search([numbered(f"path{n}") for n in range(paths)], evaluate, allowed, [Candidate("a", recipe_of(["x"]))])
    names = [candidate.name for candidate, _ in tried]
    assert names[0] == "a"
    assert len(names) == len(set(names)) == min(allowed, 1 + paths * 4)
    # Paths take turns: none is ahead of another by more than one recipe.
    counts = [sum(name.startswith(f"path{n} ") for name in names) for n in range(paths)]
    assert max(counts) - min(counts) <= 1


def test_a_recipe_on_two_paths_is_tried_once() -> None:
    seen = []

    def evaluate(candidate: Candidate) -> Point:
        seen.append(candidate.recipe.sha256)
        return Point(candidate.name, 0.5, 9.0, 0.0)

    search([numbered("same"), numbered("same")], evaluate, 100)
    assert len(seen) == len(set(seen)) == 4


def test_the_fastest_is_by_time_and_where_none_was_taken_by_multiply_accumulates() -> None:
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
    assert fastest(none)[1].name == "d"  # the least loss
    with pytest.raises(UsageError, match="none of the 1 recipes tried made a model: no layer takes 3:5"):
        fastest([(candidate("a"), Point("a", failed="no layer takes 3:5"))])


def test_a_loss_holds_with_its_standard_error() -> None:
    assert held(0.5, 0.5, 1.0)
    assert not held(0.6, 0.5, 1.0)
    assert held(-2.0, 0.4, 0.0)


# ---- the freedom of a recipe


def test_each_pattern_has_paths_of_its_own() -> None:
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


def test_a_share_that_the_recipe_names_is_where_its_masks_start_and_patterns_stay_mixed() -> None:
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
def test_weaker_merging(params: dict[str, object], half: dict[str, object]) -> None:
    assert weaker(Step(name="tome", params=params), 0.5) == half


def test_a_recipe_without_freedom_is_refused() -> None:
    with pytest.raises(UsageError, match="nothing to search over; give it a budget"):
        paths_of(recipe_of([{"nm-mask": {"pattern": "2:4"}}]), lambda given: 0.5)


def point_of(name: str, *intervals: tuple[float, float], holds: bool = True) -> Point:
    speedups = tuple(Speedup((low + high) / 2, (low, high), 20, "dense") for low, high in intervals)
    return Point(name, 0.5, 0.1, 0.1, speedups, holds)


def test_recipes_whose_speed_cannot_be_told_from_the_one_taken_are_named() -> None:
    points = (
        point_of("taken", (1.4, 1.6), (1.5, 1.7)),
        point_of("as fast", (1.3, 1.7), (1.4, 1.6)),
        point_of("slower", (1.0, 1.2), (1.1, 1.2)),
        point_of("as fast and beyond the limit", (1.4, 1.6), (1.5, 1.7), holds=False),
    )
    found = Tuning(1.0, 4, 64, (1, 8), points, "taken")
    assert points[0].speed_interval == pytest.approx((math.sqrt(1.4 * 1.5), math.sqrt(1.6 * 1.7)))
    assert found.as_fast() == ("as fast",)
    said = "The speed of as fast cannot be told from that of the recipe taken: another run may take another."
    assert said in searched(found)
    assert said not in searched(with_fields(found, points=(points[0], points[2])))


def test_without_timing_speed_is_what_counting_says_and_sure() -> None:
    points = (Point("taken", 0.5, 0.1, 0.1, (), True), Point("same", 0.5, 0.1, 0.1, (), True))
    assert points[0].speed_interval == (2.0, 2.0)
    assert Tuning(1.0, 4, 64, (), points, "taken").as_fast() == ()


# ---- on a model


@pytest.fixture(scope="module", autouse=True)
def _kept_exports() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        keep_exports(patched, {})
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model that loses nothing to 2:4 and most of its accuracy to 1:8, and its images: 192 in each split."""
    return write_sparse_vit(tmp_path_factory.mktemp("model"), images=192)


def tuned_files(files: tuple[Path, Path], output: Path, limit: float, evaluations: int = 3) -> Artifact:
    recipe = recipe_of(
        [
            {"mp-budget": {"patterns": ["1:8", "2:4"], "null": False}},
            {"nm-mask": {"criterion": "magnitude", "refit": "none"}},
        ],
        gates={"max_drop": limit},
        tune={"evaluations": evaluations},
        bench={"batches": [1, 4], "seconds": 0.05, "threads": 1},
        data={"calibration": 64, "validation": 128},
    )
    model, images = files
    return mpcompile.compile(model, recipe, data=images, output=output)


SPEEDS = (3.0, 1.5, 1.2, 0.8, 0.9)  # of the three recipes in the order in which they are tried, and of int8 both ways


@pytest.fixture(scope="module")
def tuned_artifact(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The model after a search in which every speed is given, so that the recipe taken does not hang on the machine."""
    given = iter([speed for speed in SPEEDS for _ in range(2)])  # at two batch sizes
    names = []

    def in_turns(engines: Mapping[str, Engine], *more: object) -> dict[str, NDArray[np.float64]]:
        names.append(set(engines))
        return {"dense": np.full(15, next(given)), "tried": np.ones(15)}

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tune, "in_turns", in_turns)
        made = tuned_files(files, tmp_path_factory.mktemp("tuned") / "out", 4.0)
    assert names == [{"dense", "tried"}] * 10
    return made


def test_the_fastest_recipe_that_holds_is_taken_and_every_other_is_told(tuned_artifact: Artifact) -> None:
    report = tuned_artifact.report
    found = report.tuning
    assert found is not None
    assert found.allowed == len(found.points) == 3
    assert found.images == 128
    # Written as they are first, then the middle of the path whose strongest recipe lost too much.
    assert [point.name for point in found.points[:2]] == ["1:8, as written", "2:4, as written"]
    assert found.points[2].name.startswith("1:8, MACs ")
    assert [point.speed for point in found.points] == pytest.approx(SPEEDS[:3])
    assert [point.holds for point in found.points[:2]] == [False, True]
    chosen = found.points[1]
    assert chosen.name == found.chosen
    assert all(len(point.speedups) == 2 for point in found.points)
    # What is shipped is what was chosen, and its recipe makes it again without a search.
    assert report.recipe.tune is None
    assert tuned_artifact.recipe == report.recipe
    assert report.cost.compressed / report.cost.dense == pytest.approx(chosen.macs)
    assert [gate.holds for gate in report.gates] == [True]


def test_int8_is_told_as_a_reference_and_in_the_markdown(tuned_artifact: Artifact) -> None:
    found = tuned_artifact.report.tuning
    assert found is not None
    assert [point.name for point in found.references] == ["int8, dynamic", "int8, static"]
    assert [point.speed for point in found.references] == pytest.approx(SPEEDS[3:])
    assert all(point.macs is None for point in found.references)
    dynamic = found.references[0].drop
    assert dynamic is not None
    assert abs(dynamic) < 5  # int8 with scales found call by call costs a ViT little
    text = tuned_artifact.report.markdown()
    for point in (*found.points, *found.references):
        row = next(line for line in text.splitlines() if line.startswith(f"| {point.name} |"))
        assert f"| {point.drop:.2f} | {point.error:.2f} | {'yes' if point.holds else 'no'} |" in row
        assert row.count("|") == 8


def test_where_nothing_holds_the_least_loss_is_written_and_the_gate_fails(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpcompile.runtimes.native.missing", lambda: "left out")  # no speed matters here
    with pytest.raises(AccuracyError, match="fails its gate"):
        tuned_files(files, tmp_path / "out", 0.0, evaluations=1)
    report = Artifact.open(tmp_path / "out").report
    assert report.tuning is not None
    assert report.tuning.chosen == "1:8, as written"


def test_what_tuning_needs_is_said(files: tuple[Path, Path], tmp_path: Path) -> None:
    model, images = files
    passes = [{"mp-budget": {"patterns": ["2:4"]}}, "nm-mask"]
    with pytest.raises(UsageError, match=r"tune needs a limit on the loss of accuracy; give --max-drop"):
        mpcompile.compile(model, recipe_of(passes, tune={}), data=images, output=tmp_path / "a")
    none = recipe_of(passes, tune={}, gates={"max_drop": 1.0}, data={"validation": 0})
    with pytest.raises(UsageError, match="labelled validation images and has none"):
        mpcompile.compile(model, none, data=images, output=tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_a_recipe_that_fails_on_the_way_is_a_point_that_says_why(files: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = recipe_of(
        [{"mp-budget": {"patterns": ["3:5", "2:4"]}}, {"nm-mask": {"criterion": "magnitude", "refit": "none"}}],
        gates={"max_drop": 4.0},
        tune={"evaluations": 2},
        bench={"batches": [1], "seconds": 0.1},
        data={"calibration": 32, "validation": 128, "held_out": 64},
    )
    with pytest.raises(mpcompile.MpcompileError, match="no layer takes 3:5"):
        mpcompile.compile(files[0], recipe, data=files[1], output=tmp_path / "out")


# ---- the chart


def test_the_chart_shows_every_recipe_where_it_is(tuned_artifact: Artifact) -> None:
    found = tuned_artifact.report.tuning
    assert found is not None
    chart = tuning_chart.tuning(found)
    everyone = [*found.points, *found.references]
    assert len(chart.dots) == 1 + len(everyone)  # with the dense model
    assert all(0 <= dot.x <= chart.width and 0 <= dot.y <= chart.height for dot in chart.dots)
    dense, *others = chart.dots
    for point, dot in zip(everyone, others, strict=True):
        assert (dot.x > dense.x) == (point.speed > 1)
        assert (dot.y > dense.y) == (float(point.drop or 0) > 0)
        assert point.name in dot.about
        assert point.name in chart.words
    # A recipe that lost far more than the limit stands at the lower edge, and says so.
    assert "below the picture" in others[0].about
    assert [label.text for label in chart.labels if label.kind == "strong"] == ["dense", found.chosen]
    page = (tuned_artifact.folder / "report.html").read_text()
    assert 'aria-labelledby="tuning-chart-title' in page
