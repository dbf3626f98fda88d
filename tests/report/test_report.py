"""report.html, report.md and report.json have the same numbers, and names in a report are always escaped."""

import html
import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest
from report_page import PageTables, jq, markdown_tables, read_number, with_training_and_tuning

from mpcompile.driver.artifact import Artifact
from mpcompile.report import render
from mpcompile.report.run_tables import summary
from mpcompile.report.schema import Report
from mpcompile.report.table import Cell, Table, columns, number

HOSTILE = "<script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\">|`"


@pytest.fixture(scope="module")
def trained(reported: Artifact) -> Report:
    return with_training_and_tuning(reported.report)


@pytest.fixture(scope="module")
def tables(trained: Report) -> PageTables:
    return PageTables(render.html(trained))


@pytest.fixture(scope="module")
def content(trained: Report) -> Any:
    return json.loads(trained.model_dump_json())


def test_numbers_of_the_page_equal_the_values_at_their_keys(tables: PageTables, content: Any) -> None:
    checked, unkeyed = 0, set()
    for name, rows in tables.tables.items():
        for row in rows:
            for text, attrs in row:
                if key := attrs.get("data-key"):
                    shown, half = read_number(text)
                    # The text is rounded to its last digit; 1e-9 allows for the last bit of a product.
                    assert abs(jq(content, key) - shown) <= half * (1 + 1e-9) + 1e-12, (name, text, key)
                    assert float(str(attrs["data-value"])) == pytest.approx(jq(content, key), rel=1e-9), (name, key)
                    checked += 1
                elif "data-value" in attrs:
                    unkeyed.add(name)
    assert checked > 26 * 6
    assert unkeyed == {"summary-table", "budget-table", "epochs-table"}  # sums over layers, and the number of the epoch


def test_sums_of_the_page_equal_sums_over_layers(tables: PageTables, content: Any) -> None:
    weights = [math.prod(row["shape"]) for row in content["layers"]]
    kept = [round(row["density"] * count) for row, count in zip(content["layers"], weights, strict=True)]
    [cells] = [row for row in tables.texts("summary-table") if row[0] == "non-zero weights"]
    assert cells[1:] == [f"{sum(weights) / 1e6:.2f} M", f"{sum(kept) / 1e6:.2f} M", f"{sum(kept) / sum(weights):.2f}×"]
    dense = content["cost"]["dense"]
    for pattern, count, macs, left in tables.texts("budget-table")[1:]:
        rows = [row for row in content["layers"] if (row["pattern"] or "dense") == pattern]
        assert int(count) == len(rows)
        assert macs == f"{100 * sum(row['macs'] for row in rows) / dense:.1f} %"
        assert left == f"{100 * sum(row['macs_left'] for row in rows) / dense:.1f} %"


def test_every_layer_has_the_numbers_of_its_row(tables: PageTables, content: Any) -> None:
    head, *rows = tables.tables["layers-table"]
    names = [text.strip() for text, _ in head]
    assert names == [
        "layer", "MACs", "pattern", "kept", "σ", "edge", "spikes", "distance", "refit error", "share of change",
        "reordered", "kernel", "speed", "location in the file, or why it is dense",
    ] or "kernel" not in names  # fmt: skip
    shares = {row["name"]: row["share"] for row in content["certificate"]["layers"]}
    assert len(rows) == len(content["layers"])
    for row, cells in zip(content["layers"], rows, strict=True):
        shown = dict(zip(names, (text.strip() for text, _ in cells), strict=True))
        assert shown["layer"] == row["name"]
        assert shown["MACs"] == f"{100 * row['macs'] / content['cost']['dense']:.1f} %"
        assert shown["pattern"] == (row["pattern"] or "dense")
        assert shown["kept"] == f"{100 * row['density']:.1f} %"
        assert shown["distance"] == (f"{row['spectrum']['fit_error']:.3f}" if row["spectrum"] else "")
        assert shown["spikes"] == (str(row["spectrum"]["spikes"]) if row["spectrum"] else "")
        assert shown["refit error"] == ("" if row["missed"] is None else f"{100 * row['missed']:.3f} %")
        assert shown["share of change"] == (f"{100 * shares[row['name']]:.1f} %" if row["name"] in shares else "")
        assert shown["location in the file, or why it is dense"] == (
            row["reason"] or f"{row['initializer']}, groups on axis {row['axis']}"
        )
        # The test of keys above would not notice the key and the number of another layer.
        for _, attrs in cells:
            if match := re.match(r"\.layers\[(\d+)\]", attrs.get("data-key") or ""):
                assert content["layers"][int(match[1])]["name"] == row["name"]
            if match := re.match(r"\.certificate\.layers\[(\d+)\]", attrs.get("data-key") or ""):
                assert content["certificate"]["layers"][int(match[1])]["name"] == row["name"]


def test_markdown_has_the_tables_of_the_page(trained: Report, tables: PageTables, content: Any) -> None:
    found = markdown_tables(render.markdown(trained))
    same = (
        "summary", "gates", "tuning", "checks", "budget", "passes", "epochs", "certificate", "latency",
        "environment", "files",
    )  # fmt: skip
    for name in same:
        assert tables.texts(f"{name}-table") in found, name
    if content["verdicts"]:
        assert tables.texts("verdicts-table") in found
    [layers] = [table for table in found if table[0][:3] == ["layer", "kind", "shape"]]
    wide = {
        row[0]: dict(zip(tables.texts("layers-table")[0], row, strict=True)) for row in tables.texts("layers-table")
    }
    for name, kind, shape, macs, pattern, kept, missed, where in layers[1:]:
        [row] = [row for row in content["layers"] if row["name"] == name]
        assert (kind, shape) == (row["kind"], "×".join(map(str, row["shape"])))
        cells = wide[name]
        assert [macs, pattern, kept, missed] == [cells[key] for key in ("MACs", "pattern", "kept", "refit error")]
        assert where == cells["location in the file, or why it is dense"]
    [times] = [table for table in found if table[0][:3] == ["", "batch", "median"]]
    expected = [pair[side] for pair in content["latency"] for side in ("dense", "compressed")]
    for times_row, t in zip(times[1:], expected, strict=True):
        low, high = t["interval_ms"]
        assert times_row[1:] == [
            str(t["batch"]), f"{t['p50_ms']:.3f}", f"{low:.3f} to {high:.3f}", f"{t['p90_ms']:.3f}",
            f"{t['p99_ms']:.3f}", str(t["count"]), t["device"],
        ]  # fmt: skip


def test_texts_of_the_summary_are_the_rows_of_the_page(reported: Artifact, tables: PageTables) -> None:
    assert [list(row) for row in summary(reported.report).texts()] == tables.texts("summary-table")[1:]


def test_the_folder_has_both_views(reported: Artifact) -> None:
    for name, text in (("report.md", render.markdown(reported.report)), ("report.html", render.html(reported.report))):
        assert (reported.folder / name).read_text(encoding="utf-8") == text
    page = render.html(reported.report)
    for sentence in reported.report.verdict:
        assert sentence in html.unescape(page)
    for name in re.findall(r'href="([^"#:]+)"', page):
        assert (reported.folder / name).is_file(), name


def test_names_are_escaped(reported: Artifact) -> None:
    report = reported.report
    layer = report.layers[3].model_copy(update={"name": HOSTILE, "reason": HOSTILE, "unpermuted": HOSTILE})
    hostile = report.model_copy(
        update={
            "model": replace(report.model, arch=HOSTILE, name=HOSTILE),
            "layers": (*report.layers[:3], layer, *report.layers[4:]),
            "verdict": (HOSTILE,),
            "notes": (HOSTILE,),
            "environment": {"device": HOSTILE, HOSTILE: HOSTILE},
            "verdicts": tuple(replace(row, layer=HOSTILE, reason=HOSTILE) for row in report.verdicts[:1]),
            "passes": (replace(report.passes[0], name=HOSTILE, notes=(HOSTILE,)),),
        }
    )
    page = render.html(hostile)
    assert PageTables(page).scripts == 1  # the page's own
    assert "<img src=x" not in page
    assert HOSTILE in {row[0] for row in PageTables(page).texts("layers-table")}
    rows = next(table for table in markdown_tables(render.markdown(hostile)) if table[0][:2] == ["layer", "kind"])
    assert HOSTILE in {row[0] for row in rows}
    assert {len(row) for row in rows} == {8}


def test_sections_without_data_are_left_out(artifact: Artifact) -> None:
    report = artifact.report.model_copy(
        update={"comparison": None, "latency": (), "idle": "there is no GPU", "verdicts": (), "passes": ()}
    )
    page = html.unescape(render.html(report))
    assert "Speed was not measured: there is no GPU." in page
    assert "accuracy was not measured and nothing is proven about the outputs" in page
    tables = PageTables(render.html(report))
    assert not {"latency-table", "gates-table", "spectra-table", "epochs-table", "verdicts-table"} & set(tables.tables)
    assert not {"σ", "distance", "share of change", "kernel"} & set(tables.texts("layers-table")[0])
    for target in re.findall(r'href="#([\w-]+)"', page):
        assert f'<section id="{target}"' in page


def test_failed_gates_are_counted(reported: Artifact) -> None:
    gates = tuple(gate.model_copy(update={"holds": False, "found": 60.0}) for gate in reported.report.gates)
    assert "1 of 1 gates fail." in render.html(reported.report.model_copy(update={"gates": gates}))
    assert "Every gate holds." in render.html(reported.report)


def test_cells_of_markdown_are_escaped() -> None:
    table = Table(columns("a", "b|c"), ((Cell("x|y\nz <b>"), number(None, "{:.1f}", ".k")),), ".")
    assert table.markdown() == "| a | b\\|c |\n|---|---|\n| x\\|y z &lt;b> |  |"
