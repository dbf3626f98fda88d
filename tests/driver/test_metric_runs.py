"""`--metric` and `--data pkg.mod:fn`: measured on both engines, the limit in its units, restore and tune."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_metric import closeness, samples
from test_values import Mapped, recipe

import mpcompile
from mpcompile.data.images import Data
from mpcompile.driver.artifact import Artifact
from mpcompile.errors import AccuracyError, LoadError, UsageError
from mpcompile.recipe.schema import Recipe

HARSH = {"nm-mask": {"pattern": "1:16", "criterion": "magnitude", "refit": "none"}}


def harsh(*more: Any, **options: Any) -> Recipe:
    return Recipe.checked({"passes": [HARSH, *more], "bench": {"seconds": 0.02, "batches": [1]}, **options})


def test_a_metric_is_measured_on_both_engines_and_limits_the_run(tmp_path: Path) -> None:
    given = harsh(metric="own_metric:closeness", gates={"max_drop": 1e-4})
    with pytest.raises(AccuracyError, match=r"fails its gate: closeness drop is .*; 0.0001 is allowed"):
        mpcompile.compile(Mapped(), given, data="own_metric:samples", output=tmp_path / "out")
    artifact = Artifact.open(tmp_path / "out")
    c = artifact.report.comparison
    assert c is not None
    assert c.metric is not None
    assert c.values is not None
    rows = [samples()[index] for index in _held_out(given)]
    images, targets = (torch.stack(part) for part in zip(*rows, strict=True))
    expected = closeness(torch.from_numpy(artifact.load("onnx")(images.numpy())), targets)
    assert c.metric.compressed == pytest.approx(float(expected.mean()), rel=1e-4)
    assert c.metric.drop == pytest.approx(c.metric.dense - c.metric.compressed)
    assert c.metric.interval is not None
    assert c.metric.interval[0] < c.metric.drop < c.metric.interval[1]
    page = (tmp_path / "out/report.md").read_text()
    assert f"closeness is {c.metric.compressed:.4g} compressed and {c.metric.dense:.4g} dense" in page
    assert "closeness, 24 held-out images" in page or f"closeness, {len(rows)} held-out images" in page
    assert "95% confidence interval of the drop" in page


def _held_out(given: Recipe) -> tuple[int, ...]:
    from mpcompile.driver.inputs import data_for
    from mpcompile.frontend.capture import capture

    return data_for("own_metric:samples", capture(Mapped()), given.data).held_out.order


def test_restore_keeps_the_drop_of_the_metric_within_its_limit(tmp_path: Path) -> None:
    """The targets are the dense model's outputs, so that every mask loses; only the dense model loses nothing."""
    model = Mapped().eval()
    with torch.no_grad():
        rows = [(image, model(image[None])[0]) for image, _ in samples()]

    def likeness(outputs: torch.Tensor, targets: torch.Tensor) -> float:  # one number for a batch
        return -float((outputs - targets).abs().mean())

    found = {}
    for limit in (10.0, 1e-6):
        given = harsh({"restore": {"max_drop": limit}}, gates={"max_drop": 1e-5 if limit < 1 else 10})
        out = tmp_path / str(limit)
        found[limit] = mpcompile.compile(model, given, data=rows, metric=likeness, output=out).report
    assert [sum(row.pattern is not None for row in report.layers) for report in found.values()] == [1, 0]
    assert any(row.reason and row.reason.startswith("restored: ") for row in found[1e-6].layers)
    for report in found.values():
        assert [gate.holds for gate in report.gates] == [True]
        assert report.comparison is not None
        assert report.comparison.metric is not None
        assert report.comparison.metric.interval is None


def test_tune_searches_within_the_limit_of_the_metric(tmp_path: Path) -> None:
    passes = [{"mp-budget": {"patterns": ["1:16"], "macs": 0.5}}, "nm-mask"]
    given = Recipe.checked(
        {
            "passes": passes,
            "gates": {"max_drop": 10},
            "tune": {"evaluations": 1},
            "bench": {"seconds": 0.02, "batches": [1]},
        }
    )
    out = tmp_path / "out"
    report = mpcompile.compile(Mapped(), given, data=samples(), metric=closeness, output=out).report
    assert report.tuning is not None
    assert report.tuning.metric == "closeness"
    [point] = report.tuning.points
    assert point.drop is not None
    assert abs(point.drop) < 1
    page = (out / "report.md").read_text()
    assert "drop of closeness" in page
    assert "drop in closeness plus the standard error of the drop is at most 10. Int8" in page


def test_what_is_refused_before_any_pass(tmp_path: Path) -> None:
    out = tmp_path / "out"
    own = recipe(metric="own_metric:closeness")
    with pytest.raises(UsageError, match="--metric is measured on images; give --data PKG.MOD:FN"):
        mpcompile.compile(Mapped(), own, output=out)
    with pytest.raises(LoadError, match="own_metric:nothing could not be imported: AttributeError"):
        mpcompile.compile(Mapped(), recipe(metric="own_metric:nothing"), data=samples(), output=out)
    with pytest.raises(LoadError, match="own_metric:SAMPLES is a int; it must be a function"):
        mpcompile.compile(Mapped(), own, data="own_metric:SAMPLES", output=out)
    with pytest.raises(UsageError, match="metric: 'iou' names no function; give pkg.mod:name"):
        recipe(metric="iou")
    arrays: dict[str, Any] = {f"{split}_images": np.zeros((20, 8, 8), np.uint8) for split in ("calibration", "heldout")}
    np.savez(tmp_path / "a.npz", **arrays, calibration_labels=np.arange(20) % 4, heldout_labels=np.arange(20) % 4)
    with pytest.raises(UsageError, match="the metric closeness needs a target for each image"):
        mpcompile.compile(Mapped(), own, data=tmp_path / "a.npz", output=out)
    assert not out.exists()


def test_the_metric_and_the_targets_are_part_of_a_runs_fingerprint() -> None:
    from mpcompile.data.given import given_data
    from mpcompile.data.metric import Metric
    from mpcompile.pipeline.fingerprint import training_key
    from mpcompile.testing import tiny_source

    def data(shift: float = 0.0) -> Data:
        rows = [(image, target + shift) for image, target in samples()]
        return given_data(rows, tiny_source(), ("images",))

    metric = Metric("closeness", closeness)
    keys = [data().judged_by(metric), data(1.0).judged_by(metric), data().judged_by(Metric("other", closeness)), data()]
    assert len(set(map(training_key, keys))) == 4
    assert training_key(data().judged_by(metric)) == training_key(keys[0])
