"""The charts of a report: their marks are where and as large as the numbers of the report say."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from report_page import with_training_and_tuning

from mpcompile.driver.artifact import Artifact
from mpcompile.report.chart import Bar, Chart, Dot, Label, Scale, ticks
from mpcompile.report.layer_charts import budget, spikes
from mpcompile.report.render import svg
from mpcompile.report.run_charts import latency, timeline, tokens, training
from mpcompile.report.schema import Report
from mpcompile.report.search_chart import accuracy_speed, tuning
from mpcompile.report.search_schema import Point


@pytest.fixture(scope="module")
def trained(reported: Artifact) -> Report:
    return with_training_and_tuning(reported.report)


def bars(chart: Chart | None) -> list[Bar]:
    assert chart is not None
    return [mark for mark in chart.marks if isinstance(mark, Bar)]


def test_the_filled_area_of_the_budget_is_the_remaining_macs(reported: Artifact) -> None:
    report = reported.report
    marks = bars(budget(report))
    whole = sum(bar.width * bar.height for bar in marks if bar.style == "empty")
    filled = sum(bar.width * bar.height for bar in marks if bar.style != "empty")
    # Sums of about thirty floats; MACs outside all layers are drawn only if they are at least a thousandth.
    assert filled / whole == pytest.approx(report.cost.compressed / report.cost.dense, rel=2e-3)


def test_layers_and_the_rest_add_up_to_the_whole_cost(artifact: Artifact) -> None:
    cost, rows = artifact.report.cost, artifact.report.layers
    before = sum(row.macs for row in rows if row.macs is not None)
    after = sum(row.macs_left for row in rows if row.macs_left is not None)
    assert before < cost.dense
    # Without token merging only layers save MACs; counts are whole numbers, exact in a float.
    assert cost.dense - before == cost.compressed - after
    for row in rows:
        assert row.macs is not None
        assert row.macs_left == pytest.approx(row.macs * row.density)


def test_bars_are_as_long_as_their_numbers(trained: Report) -> None:
    marks = bars(latency(trained))
    for n, pair in enumerate(trained.latency):
        dense, compressed = marks[2 * n : 2 * n + 2]
        assert compressed.width / dense.width == pytest.approx(pair.compressed.p50_ms / pair.dense.p50_ms)
    marks, counts = bars(tokens(trained)), trained.cost.tokens
    assert [bar.height / marks[0].height for bar in marks] == pytest.approx([n / counts[0] for n in counts])
    longest = max(range(len(trained.passes)), key=lambda n: trained.passes[n].seconds)
    widths = [bar.width for bar in bars(timeline(trained))]
    assert widths.index(max(widths)) == longest
    assert len(bars(spikes(trained))) == sum(row.spectrum is not None for row in trained.layers)
    losses = training(trained)
    assert losses is not None
    assert "From 1.5000 in the first epoch to 0.9000 in the last." in losses.description


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 2.3e-5), (0.93, 1.18), (0.0, 7e6), (1.0, 1.001)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    values = ticks(low, high)
    assert 2 <= len(values) <= 8
    assert all(low - 1e-9 * high <= value <= high * (1 + 1e-9) for value in values)
    assert Scale(low, high, 0, 100)(high) == 100


def test_models_below_the_axis_of_accuracy_are_drawn_at_its_edge() -> None:
    points = [Point("near", 0.5, 0.2), Point("far", 0.25, 40.0)]
    chart = accuracy_speed(points, ["near", "far"], lowest=-5.0, speed="speedup")
    _, near, far = (mark for mark in chart.marks if isinstance(mark, Dot))
    assert near.y < far.y < chart.height
    assert near.x < far.x < chart.width
    assert "below the axis" in far.tooltip
    assert "far ↓" in {mark.text for mark in chart.marks if isinstance(mark, Label)}


def test_the_picture_in_the_readme_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from readme_picture import PICTURE, pattern_chart

    assert svg(pattern_chart()) == PICTURE.read_text(encoding="utf-8")


def test_a_chart_as_a_file_is_well_formed_and_needs_no_page(trained: Report) -> None:
    assert trained.tuning is not None
    text = svg(tuning(trained.tuning))
    assert svg(tuning(trained.tuning)) == text
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) == 3  # dense, 2:4 and int8; 1:4 failed
    # Its own style sheet defines every colour and every class that it uses.
    defined = set(re.findall(r"(--\w+):", text))
    assert set(re.findall(r"var\((--\w+)\)", text)) <= defined
