"""`tune` on a model: the chosen recipe, the record of the search in the report, and its chart."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from kept_exports import keep_exports
from numpy.typing import NDArray
from sparse_vit import write_sparse_vit

import mpcompile
from mpcompile.driver import tune
from mpcompile.driver.artifact import Artifact
from mpcompile.errors import AccuracyError, UsageError
from mpcompile.recipe.schema import Recipe, read_recipe
from mpcompile.report import search_chart
from mpcompile.report.chart import Dot, Label
from mpcompile.report.render import markdown
from mpcompile.report.search_schema import Tuning
from mpcompile.runtimes import Engine


@pytest.fixture(scope="module", autouse=True)
def _kept_exports() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        keep_exports(patched, {})
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model that loses no accuracy at 2:4 and most of it at 1:8, and its images, 192 in each split."""
    return write_sparse_vit(tmp_path_factory.mktemp("model"), images=192)


def tuned_files(files: tuple[Path, Path], output: Path, limit: float, evaluations: int = 3) -> Artifact:
    model, images = files
    return mpcompile.compile(model, tuning_recipe(limit, evaluations), data=images, output=output)


def tuning_recipe(limit: float, evaluations: int) -> Recipe:
    return Recipe.checked(
        {
            "passes": [
                {"mp-budget": {"patterns": ["1:8", "2:4"], "null": False}},
                {"nm-mask": {"criterion": "magnitude", "refit": "none"}},
            ],
            "gates": {"max_drop": limit},
            "tune": {"evaluations": evaluations},
            "bench": {"batches": [1, 4], "seconds": 0.05, "threads": 1},
            "data": {"calibration": 64, "validation": 128},
        }
    )


SPEEDS = (3.0, 1.5, 1.2, 0.8, 0.9)  # of the three recipes in order of evaluation, then of the two int8 baselines


@pytest.fixture(scope="module")
def tuned_artifact(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The artifact of a search with fixed speeds, so that the chosen recipe does not depend on the machine."""
    speeds = iter([speed for speed in SPEEDS for _ in range(2)])  # at two batch sizes
    timed = []

    def interleaved_times_ms(engines: Mapping[str, Engine], *more: object) -> dict[str, NDArray[np.float64]]:
        timed.append(set(engines))
        return {"dense": np.full(15, next(speeds)), "tried": np.ones(15)}

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tune, "interleaved_times_ms", interleaved_times_ms)
        artifact = tuned_files(files, tmp_path_factory.mktemp("tuned") / "out", 4.0)
    assert timed == [{"dense", "tried"}] * 10
    return artifact


def test_the_fastest_recipe_within_the_limit_is_chosen_and_all_are_reported(tuned_artifact: Artifact) -> None:
    report = tuned_artifact.report
    search = report.tuning
    assert search is not None
    assert search.allowed == len(search.points) == 3
    assert search.images == 128
    # The strongest recipe of each path first, then the middle of the path whose strongest recipe exceeded the limit.
    assert [point.name for point in search.points[:2]] == ["1:8, as written", "2:4, as written"]
    assert search.points[2].name.startswith("1:8, MACs ")
    assert [point.speed for point in search.points] == pytest.approx(SPEEDS[:3])
    assert [point.holds for point in search.points[:2]] == [False, True]
    chosen = search.points[1]
    assert chosen.name == search.chosen
    assert all(len(point.speedups) == 2 for point in search.points)
    # The artifact is that of the chosen recipe, which repeats it without a search.
    assert report.recipe.tune is None
    assert tuned_artifact.recipe == report.recipe
    assert report.cost.compressed / report.cost.dense == pytest.approx(chosen.macs)
    assert [gate.holds for gate in report.gates] == [True]


def test_the_recipe_of_each_row_is_a_file_that_repeats_it(tuned_artifact: Artifact) -> None:
    folder = tuned_artifact.folder / "tried"
    assert sorted(path.name for path in folder.iterdir()) == ["1.yaml", "2.yaml", "3.yaml"]
    recipes = [read_recipe(folder / f"{row}.yaml") for row in (1, 2, 3)]
    assert recipes[1] == tuned_artifact.recipe
    assert len({recipe.sha256 for recipe in recipes}) == 3
    assert all(recipe.tune is None for recipe in recipes)
    listed = [row.name for row in tuned_artifact.report.files]
    assert {"tried/1.yaml", "tried/2.yaml", "tried/3.yaml"} <= set(listed)
    for page in ("report.md", "report.html"):
        text = (tuned_artifact.folder / page).read_text()
        assert "The fastest within the limit: 2:4, as written, 1.50 times as fast as dense" in text
        assert "(tried/1.yaml)" in text


def test_a_search_reports_its_record_after_each_recipe(files: tuple[Path, Path], tmp_path: Path) -> None:
    found: list[Tuning] = []
    model, images = files
    recipe = tuning_recipe(4.0, 2)
    mpcompile.compile(
        model, recipe, data=images, output=tmp_path / "out",
        observe=lambda at: found.append(at.found) if isinstance(at.found, Tuning) else None,
    )  # fmt: skip
    assert [len(record.points) for record in found] == [1, 2]
    assert all(record.chosen == "" for record in found)


def test_int8_baselines_are_in_the_report_and_in_its_markdown(tuned_artifact: Artifact) -> None:
    search = tuned_artifact.report.tuning
    assert search is not None
    assert [point.name for point in search.references] == ["int8, dynamic", "int8, static"]
    assert [point.speed for point in search.references] == pytest.approx(SPEEDS[3:])
    assert all(point.macs is None for point in search.references)
    dynamic = search.references[0].drop
    assert dynamic is not None
    assert abs(dynamic) < 5  # dynamic quantisation costs a ViT little accuracy
    text = markdown(tuned_artifact.report)
    for point in (*search.points, *search.references):
        row = next(line for line in text.splitlines() if f"| {point.name} |" in line)
        assert f"| {point.drop:.2f} | {point.error:.2f} | {'yes' if point.holds else 'no'} |" in row
        assert row.count("|") == 9


def test_if_no_recipe_keeps_the_limit_the_smallest_drop_is_written_and_the_gate_fails(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpcompile.runtimes.native.missing", lambda: "left out")  # speed does not matter in this test
    with pytest.raises(AccuracyError, match="fails its gate"):
        tuned_files(files, tmp_path / "out", 0.0, evaluations=1)
    report = Artifact.open(tmp_path / "out").report
    assert report.tuning is not None
    assert report.tuning.chosen == "1:8, as written"


def test_tune_is_refused_without_limit_or_validation_images(files: tuple[Path, Path], tmp_path: Path) -> None:
    model, images = files
    recipe = {"passes": [{"mp-budget": {"patterns": ["2:4"]}}, "nm-mask"], "tune": {}}
    with pytest.raises(UsageError, match=r"tune needs a limit on the loss of accuracy; give --max-drop"):
        mpcompile.compile(model, Recipe.checked(recipe), data=images, output=tmp_path / "a")
    recipe |= {"gates": {"max_drop": 1.0}, "data": {"validation": 0}}
    with pytest.raises(UsageError, match="labelled validation images and has none"):
        mpcompile.compile(model, Recipe.checked(recipe), data=images, output=tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_a_recipe_that_no_layer_takes_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = Recipe.checked(
        {
            "passes": [
                {"mp-budget": {"patterns": ["3:5", "2:4"]}},
                {"nm-mask": {"criterion": "magnitude", "refit": "none"}},
            ],
            "gates": {"max_drop": 4.0},
            "tune": {"evaluations": 2},
            "bench": {"batches": [1], "seconds": 0.1},
            "data": {"calibration": 32, "validation": 128, "held_out": 64},
        }
    )
    with pytest.raises(mpcompile.MpcompileError, match="no layer takes 3:5"):
        mpcompile.compile(files[0], recipe, data=files[1], output=tmp_path / "out")


# ---- the chart


def test_the_chart_places_every_recipe_by_speed_and_drop(tuned_artifact: Artifact) -> None:
    search = tuned_artifact.report.tuning
    assert search is not None
    chart = search_chart.tuning(search)
    points = [*search.references, *search.points]
    dots = [mark for mark in chart.marks if isinstance(mark, Dot)]
    assert len(dots) == 1 + len(points)  # with the dense model
    assert all(0 <= dot.x <= chart.width and 0 <= dot.y <= chart.height for dot in dots)
    dense, *others = dots
    for point, dot in zip(points, others, strict=True):
        assert (dot.x > dense.x) == (point.speed > 1)
        assert (dot.y > dense.y) == (float(point.drop or 0) > 0)
        assert point.name in dot.tooltip
        assert point.name in chart.description
    # A recipe that lost far more than the limit is drawn at the lower edge, with a note.
    assert "below the axis" in others[len(search.references)].tooltip
    labels = [mark for mark in chart.marks if isinstance(mark, Label)]
    assert [label.text for label in labels if label.style == "strong"] == ["dense", search.chosen]
    page = (tuned_artifact.folder / "report.html").read_text()
    assert 'aria-labelledby="tuning-chart-title' in page


# ---- int8


def test_a_recipe_in_int8_is_searched_beside_the_dense_model_in_fp32(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        tune, "interleaved_times_ms", lambda engines, *more: {"dense": np.full(15, 1.5), "tried": np.ones(15)}
    )
    recipe = Recipe.checked(
        {
            "passes": [
                {"mp-budget": {"patterns": ["2:4"], "null": False}},
                {"nm-mask": {"criterion": "magnitude", "refit": "none"}},
                "quantize",
            ],
            "precision": "int8",
            "gates": {"max_drop": 10.0},
            "tune": {"evaluations": 1},
            "bench": {"batches": [1], "seconds": 0.05, "threads": 1},
            "data": {"calibration": 32, "validation": 64, "held_out": 64},
        }
    )
    report = mpcompile.compile(files[0], recipe, data=files[1], output=tmp_path / "out").report
    search = report.tuning
    assert search is not None
    [point] = search.points
    assert point.failed is None
    assert point.drop is not None
    assert [point.name for point in search.references] == ["int8, dynamic", "int8, static"]
    assert report.quantized is not None
    assert report.recipe.precision == "int8"
