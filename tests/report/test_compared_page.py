"""The page and the tables of `mpcompile compare`: every number is one of the comparison's JSON; names are escaped."""

import html
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chromium import Page, browsing, find_chromium
from report_page import PageTables, jq
from small_reports import ENVIRONMENT, LAYERS, comparison, int8_report, layer, small_report

from mpcompile.measure.metric_comparison import MetricComparison
from mpcompile.measure.value_errors import ValueErrors
from mpcompile.report.compared_page import accuracy_chart, compared_html
from mpcompile.report.compared_runs import compared
from mpcompile.report.compared_schema import ComparedRuns
from mpcompile.report.compared_tables import layers_table, runs_table
from mpcompile.report.conditions import parse_condition

CHROMIUM = find_chromium()
HOSTILE = "<script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\">"


@pytest.fixture(scope="module")
def found() -> ComparedRuns:
    conditions = [parse_condition("top1 < dense - 0.5"), parse_condition("speedup_int8 < 1")]
    return compared(["fp32/out", "int8/out"], [small_report(), int8_report()], conditions)


def first_number(text: str) -> tuple[float, float]:
    """The first number of a text in its own unit, and half a unit of its last digit."""
    match = re.search(r"[-+]?\d+(?:\.(\d+))?", text)
    assert match, text
    return float(match[0]), 0.5 * 10.0 ** -len(match[1] or "")


def test_every_number_of_the_tables_is_that_of_the_json(found: ComparedRuns) -> None:
    content: Any = json.loads(found.model_dump_json())
    tables = PageTables(compared_html(found))
    checked = 0
    for name, rows in tables.tables.items():
        for row in rows[1:]:
            for text, attrs in row[1:]:
                if key := attrs.get("data-key"):
                    shown, half = first_number(text)
                    expected = jq(content, key)
                    assert abs(expected - shown) <= half * (1 + 1e-9) + 1e-12, (name, text, key)
                    checked += 1
                elif name in ("runs-table", "latency-table", "conditions-table", "layers-table"):
                    numbers = re.sub(r"\d:\d|fp32|int8", "", text)  # of patterns and precisions
                    assert not re.search(r"\d", numbers), (name, text)
    assert checked > 40


def test_every_interval_is_that_of_the_json(found: ComparedRuns) -> None:
    intervals = [v.interval for run in found.runs for values in run.metrics.values() for v in values if v.interval]
    shown = {tuple(map(float, ends)) for ends in re.findall(r"\[([-+\d.]+), ([-+\d.]+)\]", compared_html(found))}
    assert len(shown) >= 5
    for low, high in shown:
        assert any(abs(low - a) < 0.0051 and abs(high - b) < 0.0051 for a, b in intervals), (low, high)


def test_the_page_holds_the_json_that_it_was_made_of(found: ComparedRuns) -> None:
    [text] = re.findall(r'<pre id="comparison"[^>]*><code>(.*?)</code>', compared_html(found), re.DOTALL)
    assert ComparedRuns.model_validate_json(html.unescape(text)) == found


def test_dense_is_the_first_row_and_what_is_missing_is_said(found: ComparedRuns) -> None:
    rows = {row[0]: row for row in runs_table(found).texts()}
    assert list(rows) == ["dense", "fp32/out", "int8/out"]
    names = [column.name for column in runs_table(found).columns]
    for name, dense, own in (
        ("top-1", "88.25 %", "87.60 %"),
        ("change in points", "", "-0.65\n[-0.95, -0.35]"),
        ("same answer", "", "99.85 %"),
        ("speed, batch 8", "baseline", "1.44×\n[1.42, 1.47]"),
        ("beside dense int8, batch 1", "", "not measured"),
        ("ONNX file", "4.85 MB", "2.91 MB\n0.60× of dense"),
        ("proven", "", "99.10 %"),
    ):
        assert (rows["dense"][names.index(name)], rows["fp32/out"][names.index(name)]) == (dense, own), name
    assert rows["int8/out"][names.index("beside dense int8, batch 1")] == "1.04×\n[1.02, 1.06]"


def test_a_metric_of_the_user_and_outputs_that_are_values_have_their_columns() -> None:
    metric = MetricComparison("miou", 0.7123, 0.7001, 0.0122, (0.01, 0.015), 2000)
    mine = small_report(comparison=replace(comparison(), metric=metric, dense=None, compressed=None, turned=None))
    found = compared(["a"], [mine])
    names, rows = [column.name for column in runs_table(found).columns], runs_table(found).texts()
    assert [rows[0][names.index("miou")], rows[1][names.index("miou")]] == ["0.7123", "0.7001"]
    assert rows[1][names.index("change of miou")] == "-0.0122\n[-0.015, -0.01]"
    assert "top-1" not in names
    chart = accuracy_chart(found)
    assert chart is not None
    assert chart.title == "Change of miou, against speedup over dense, mean of the batch sizes"
    values = ValueErrors(0.0123, 0.03, 0.02, 0.999, 0.99)
    maps = small_report(comparison=replace(comparison(), values=values, agreement=None, dense=None, compressed=None))
    table = runs_table(compared(["a"], [maps.model_copy(update={"certificate": None})]))
    shown = dict(zip((column.name for column in table.columns), table.texts()[1], strict=True))
    assert shown["relative error"].endswith(" %")
    assert not {"top-1", "same answer", "proven"} & set(shown)


def test_layers_are_matched_by_name() -> None:
    other = small_report(layers=(*LAYERS[:2], layer("extra")))
    table = layers_table(compared(["a", "b"], [small_report(), other]))
    names = [column.name for column in table.columns]
    rows = {row[0]: row for row in table.texts()}
    assert list(rows) == [*(row.name for row in LAYERS), "extra"]
    assert rows["extra"][names.index("pattern, a")] == "no such layer"
    assert rows["head"][names.index("pattern, b")] == "no such layer"
    assert rows["blocks.0.attn.qkv"][names.index("speed, a")] == "1.60×"
    assert rows["blocks.0.mlp.fc1"][names.index("speed, a")] == "1.00×"  # on the dense kernel
    assert rows["blocks.0.mlp.fc1"][names.index("pattern, b")] == "no such layer"


def test_runs_that_are_not_comparable_share_no_chart(found: ComparedRuns) -> None:
    assert accuracy_chart(found) is not None
    other = small_report(environment={**ENVIRONMENT, "processor": "Xeon"})
    apart = compared(["a", "b"], [small_report(), other])
    assert accuracy_chart(apart) is None
    page = html.unescape(compared_html(apart))
    assert page.index("Not comparable") < page.index('id="runs-table"')


def test_names_are_escaped() -> None:
    hostile = small_report(layers=(layer(HOSTILE), *LAYERS[1:]), environment={**ENVIRONMENT, "processor": HOSTILE})
    page = compared_html(compared([HOSTILE, "b"], [hostile, small_report()]))
    assert "<img" not in page
    assert page.count("<script>") == 1


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed; on Debian: apt install chromium")
    with browsing(CHROMIUM, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("width", [360, 800, 1600])
def test_the_page_fits_the_screen_sorts_and_searches(
    page: Page, found: ComparedRuns, tmp_path: Path, width: int
) -> None:
    path = tmp_path / "compare.html"
    path.write_text(compared_html(found), encoding="utf-8")
    page.emulate(width=width)
    page.open(path)
    assert page.complaints() == []
    assert page.requests() == [path.as_uri()]
    assert page.run("document.documentElement.scrollWidth") <= width
    page.run("document.getElementById('layer-search').value = 'mlp'")
    page.run("document.getElementById('layer-search').dispatchEvent(new Event('input'))")
    assert page.run("document.getElementById('layer-count').value") == f"2 of {len(LAYERS)} layers"
    page.run("document.querySelectorAll('#layers-table thead button')[2].click()")
    first = page.run("document.querySelector('#layers-table tbody tr').cells[0].textContent.trim()")
    assert first == "blocks.0.mlp.fc1"  # the largest refit error
    title = page.run("document.querySelector('#runs-table [data-key]').title")
    assert title.startswith("compare --json: .runs[0].metrics.")
