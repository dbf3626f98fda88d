"""report.json, report.md and report.html say the same, number by number, and the first keeps to its schema."""

import html
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from commandline import mpcompile

from mpcompile.driver.artifact import Artifact
from mpcompile.ir.results import Certificate, Epoch
from mpcompile.measure.timing import Speedup
from mpcompile.report.chart import Scale, ticks
from mpcompile.report.run_charts import budget, latency, spikes, timeline, tokens, training
from mpcompile.report.schema import Report, report_schema
from mpcompile.report.search_schema import Point, Tuning
from mpcompile.report.sentences import command, command_terms, verdict_on
from mpcompile.report.table import Cell, Table, columns, shown

KEYS = Path(__file__).parent / "report_keys.txt"
HOSTILE = "<script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\">|`"
UNITS = {"%": 1e-2, "ms": 1.0, "s": 1.0, "G": 1e9, "M": 1e6, "MB": 1e6, "×": 1.0, "points": 1.0}


class Tables(HTMLParser):
    """The tables of a page: by id, their rows, and of each cell its text and what it says of itself."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: dict[str, list[list[tuple[str, dict[str, str | None]]]]] = {}
        self.scripts = 0
        self.table, self.cell, self.aside = "", False, False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        if tag == "table":
            self.table = str(dict(attrs)["id"])
            self.found[self.table] = []
        elif tag == "tr":
            self.found[self.table].append([])
        elif tag in ("td", "th"):
            self.found[self.table][-1].append(("", dict(attrs)))
            self.cell = True
        elif tag == "small":
            self.aside = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.cell = False
        elif tag == "small":
            self.aside = False

    def handle_data(self, data: str) -> None:
        if self.cell and not self.aside:
            text, attrs = self.found[self.table][-1][-1]
            self.found[self.table][-1][-1] = (text + data, attrs)

    def texts(self, table: str) -> list[list[str]]:
        """The rows of a table as texts, its head first."""
        return [[text.strip() for text, _ in row] for row in self.found[table]]


def markdown_tables(text: str) -> list[list[list[str]]]:
    """The tables of a Markdown text, each with its head first."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [
        [
            [html.unescape(cell.replace("\\|", "|")).strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in block.splitlines()
            if not line.startswith("|---")
        ]
        for block in blocks
    ]


def jq(report: Any, expression: str) -> float:
    """What `jq` makes of sums, products and paths."""

    def value(match: re.Match[str]) -> str:
        found = report
        for name, place in re.findall(r"\.(\w+)|\[(\d+)\]", match[0]):
            found = found[name] if name else found[int(place)]
        return repr(float(found))

    return float(eval(re.sub(r"\.[a-z_]\w*(?:\.[a-z_]\w*|\[\d+\])*", value, expression), {"__builtins__": {}}))


def read(text: str) -> tuple[float, float]:
    """The first number of a text in its unit, and half of its last digit's worth."""
    match = re.search(
        r"([-+]?\d+)(?:\.(\d+))?(?:e([-+]\d+))?\s?(%|ms\b|GB?\b|MB?\b|s\b|×|points)?", text.replace(",", "")
    )
    assert match, text
    whole, decimals, exponent, unit = match.groups()
    scale = UNITS.get(unit or "", 1.0) * 10.0 ** int(exponent or 0)
    return float(f"{whole}.{decimals or 0}") * scale, 0.5 * 10.0 ** -len(decimals or "") * scale


@pytest.fixture(scope="module")
def trained(reported: Artifact) -> Report:
    """The report of an output folder, with epochs of training and a search for the recipe put in."""
    epochs = (Epoch(10, 1.5, 1.0, 0.5, 1e-4, 0.61, 300), Epoch(10, 0.9, None, 0.4, 1e-5, None, None))
    fast = Speedup(1.31, (1.28, 1.35), 40, "dense")
    tuning = Tuning(
        limit=1.0,
        allowed=8,
        images=64,
        batches=(1, 8),
        points=(
            Point("2:4", 0.531, 0.42, 0.11, (fast, fast), True),
            Point("1:4", failed="no layer of it can be masked"),
        ),
        chosen="2:4",
        references=(Point("int8", None, 0.05, 0.02, (fast, fast), True),),
    )
    return reported.report.model_copy(update={"epochs": epochs, "tuning": tuning})


@pytest.fixture(scope="module")
def tables(trained: Report) -> Tables:
    return Tables(trained.html())


@pytest.fixture(scope="module")
def content(trained: Report) -> Any:
    return json.loads(trained.model_dump_json())


def test_every_number_of_the_page_is_the_one_that_its_key_names(tables: Tables, content: Any) -> None:
    checked, unkeyed = 0, set()
    for name, rows in tables.found.items():
        for row in rows:
            for text, attrs in row:
                if key := attrs.get("data-key"):
                    number, half = read(text)
                    # Shown is the number rounded to the digits shown; 1e-9 for the last bit of a product.
                    assert abs(jq(content, key) - number) <= half * (1 + 1e-9) + 1e-12, (name, text, key)
                    assert float(str(attrs["data-value"])) == pytest.approx(jq(content, key), rel=1e-9), (name, key)
                    checked += 1
                elif "data-value" in attrs:
                    unkeyed.add(name)
    assert checked > 26 * 6
    assert unkeyed == {"summary-table", "budget-table", "epochs-table"}  # sums over layers, and the epoch's own place


def test_the_sums_of_the_page_are_those_of_the_layers(tables: Tables, content: Any) -> None:
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


def test_every_layer_has_its_own_numbers(tables: Tables, content: Any) -> None:
    head, *rows = tables.found["layers-table"]
    names = [text.strip() for text, _ in head]
    assert names == [
        "layer", "MACs", "pattern", "kept", "σ", "edge", "spikes", "distance", "missed", "shift", "reordered", "kernel",
        "where in the file, or why not",
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
        assert shown["missed"] == ("" if row["missed"] is None else f"{100 * row['missed']:.3f} %")
        assert shown["shift"] == (f"{100 * shares[row['name']]:.1f} %" if row["name"] in shares else "")
        assert shown["where in the file, or why not"] == (
            row["reason"] or f"{row['initializer']}, groups on axis {row['axis']}"
        )
        # A key that named another layer's number would pass the test of its own number.
        for _, attrs in cells:
            if match := re.match(r"\.layers\[(\d+)\]", attrs.get("data-key") or ""):
                assert content["layers"][int(match[1])]["name"] == row["name"]
            if match := re.match(r"\.certificate\.layers\[(\d+)\]", attrs.get("data-key") or ""):
                assert content["certificate"]["layers"][int(match[1])]["name"] == row["name"]


def test_the_markdown_has_the_tables_of_the_page(trained: Report, tables: Tables, content: Any) -> None:
    found = markdown_tables(trained.markdown())
    same = (
        "summary", "gates", "tuning", "checks", "budget", "passes", "epochs", "certificate", "spectra", "latency",
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
        assert [macs, pattern, kept, missed] == [cells[key] for key in ("MACs", "pattern", "kept", "missed")]
        assert where == cells["where in the file, or why not"]
    [times] = [table for table in found if table[0][:3] == ["", "batch", "median"]]
    expected = [pair[side] for pair in content["latency"] for side in ("dense", "compressed")]
    for times_row, t in zip(times[1:], expected, strict=True):
        low, high = t["interval_ms"]
        assert times_row[1:] == [
            str(t["batch"]), f"{t['p50_ms']:.3f}", f"{low:.3f} to {high:.3f}", f"{t['p90_ms']:.3f}",
            f"{t['p99_ms']:.3f}", str(t["count"]), t["device"],
        ]  # fmt: skip


def test_the_console_and_the_readme_get_the_rows_of_the_page(reported: Artifact, tables: Tables) -> None:
    assert [list(row) for row in reported.report.summary()] == tables.texts("summary-table")[1:]


def test_the_folder_has_all_three(reported: Artifact) -> None:
    for name, text in (("report.md", reported.report.markdown()), ("report.html", reported.report.html())):
        assert (reported.folder / name).read_text(encoding="utf-8") == text
    page = reported.report.html()
    for sentence in reported.report.verdict:
        assert sentence in html.unescape(page)
    for name in re.findall(r'href="([^"#:]+)"', page):
        assert (reported.folder / name).is_file(), name


def test_names_are_text_wherever_they_stand(reported: Artifact) -> None:
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
    page = hostile.html()
    assert Tables(page).scripts == 1  # the page's own
    assert "<img" not in page
    assert HOSTILE in {row[0] for row in Tables(page).texts("layers-table")}
    rows = next(table for table in markdown_tables(hostile.markdown()) if table[0][:2] == ["layer", "kind"])
    assert HOSTILE in {row[0] for row in rows}
    assert {len(row) for row in rows} == {8}


def test_what_was_not_measured_is_no_section(artifact: Artifact) -> None:
    report = artifact.report.model_copy(
        update={"comparison": None, "latency": (), "idle": "there is no GPU", "verdicts": (), "passes": ()}
    )
    page = html.unescape(report.html())
    assert "No speed was measured: there is no GPU." in page
    assert "accuracy was not measured and nothing is proven" in page
    tables = Tables(report.html())
    assert not {"latency-table", "gates-table", "spectra-table", "epochs-table", "verdicts-table"} & set(tables.found)
    assert not {"σ", "distance", "shift", "kernel"} & set(tables.texts("layers-table")[0])
    for target in re.findall(r'href="#([\w-]+)"', page):
        assert f'<section id="{target}"' in page


def test_a_gate_that_fails_is_told(reported: Artifact) -> None:
    gates = tuple(gate.model_copy(update={"holds": False, "found": 60.0}) for gate in reported.report.gates)
    assert "1 of 1 gates fail." in reported.report.model_copy(update={"gates": gates}).html()
    assert "Every gate holds." in reported.report.html()


# ---- charts


def test_the_area_of_the_budget_is_what_is_left(reported: Artifact) -> None:
    report = reported.report
    chart = budget(report)
    assert chart is not None
    whole = sum(bar.width * bar.height for bar in chart.bars if bar.kind == "empty")
    filled = sum(bar.width * bar.height for bar in chart.bars if bar.kind != "empty")
    # Sums of some thirty floats; what is in no layer is drawn where it is a thousandth or more.
    assert filled / whole == pytest.approx(report.cost.compressed / report.cost.dense, rel=2e-3)


def test_layers_and_the_rest_are_the_whole_cost(artifact: Artifact) -> None:
    cost, rows = artifact.report.cost, artifact.report.layers
    before = sum(row.macs for row in rows if row.macs is not None)
    after = sum(row.macs_left for row in rows if row.macs_left is not None)
    assert before < cost.dense
    # Without token merging nothing is saved but in layers; counts are whole numbers, exact in a float.
    assert cost.dense - before == cost.compressed - after
    for row in rows:
        assert row.macs is not None
        assert row.macs_left == pytest.approx(row.macs * row.density)


def test_bars_are_as_long_as_their_numbers(trained: Report) -> None:
    chart = latency(trained)
    assert chart is not None
    for n, pair in enumerate(trained.latency):
        dense, compressed = chart.bars[2 * n : 2 * n + 2]
        assert compressed.width / dense.width == pytest.approx(pair.compressed.p50_ms / pair.dense.p50_ms)
    chart = tokens(trained)
    assert chart is not None
    counts, tallest = trained.cost.tokens, chart.bars[0].height
    assert [bar.height / tallest for bar in chart.bars] == pytest.approx([n / counts[0] for n in counts])
    chart = timeline(trained)
    assert chart is not None
    longest = max(range(len(trained.passes)), key=lambda n: trained.passes[n].seconds)
    widths = [bar.width for bar in chart.bars]
    assert widths.index(max(widths)) == longest
    chart = spikes(trained)
    assert chart is not None
    assert len(chart.bars) == sum(row.spectrum is not None for row in trained.layers)
    chart = training(trained)
    assert chart is not None
    assert "From 1.5000 in the first epoch to 0.9000 in the last." in chart.words


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 2.3e-5), (0.93, 1.18), (0.0, 7e6), (1.0, 1.001)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 8
    assert all(low - 1e-9 * high <= value <= high * (1 + 1e-9) for value in found)
    assert Scale(low, high, 0, 100)(high) == 100


# ---- sentences


def test_the_command_names_what_is_known_and_no_more(reported: Artifact) -> None:
    report = reported.report
    path = report.model.name
    assert command(report) == f"mpcompile {path} --config recipe.yaml --data DATA -o OUT"
    assert report.model.sha256 in command_terms(report)[0]
    spaced = report.model_copy(update={"model": replace(report.model, name="a b; c.pt")})
    assert command(spaced).startswith("mpcompile 'a b; c.pt' --config")
    unseen = report.data.model_copy(update={"calibration": 0, "held_out": 0})
    in_memory = report.model_copy(update={"model": replace(report.model, name=report.model.arch), "data": unseen})
    assert command(in_memory) == "mpcompile MODEL --config recipe.yaml -o OUT"
    assert "was given in memory" in command_terms(in_memory)[0]


def test_the_verdict_goes_from_gain_to_proof(reported: Artifact) -> None:
    report = reported.report
    assert report.verdict[0].startswith("At batch 1 ")
    assert "the dense model in the same precision on the same target" in report.verdict[0]
    assert "proven unchanged" in report.verdict[-1]
    c = Certificate(64, 60, 50, 0.9, 0.95, 0.1, 0.3, 1.5, 0.9, ())
    told = verdict_on(report.layers, "ort", True, report.cost, None, (), certificate=c)
    assert told[-1] == (
        "Of 64 held-out answers 50 are proven unchanged; of images to come, drawn as these were, at least 90.00% get "
        "the dense model's answer, with 95% confidence."
    )


# ---- schema


def keys_of(schema: dict[str, Any]) -> set[str]:
    """Every path that a schema has, with [] for the members of a list; what is free in form ends there."""
    definitions = schema["$defs"]

    def walk(node: dict[str, Any], path: str) -> set[str]:
        if "$ref" in node:
            return walk(definitions[node["$ref"].rpartition("/")[2]], path)
        found = set()
        for option in node.get("anyOf", ()):
            found |= walk(option, path)
        if isinstance(node.get("items"), dict):
            found |= walk(node["items"], f"{path}[]")
        for name, child in node.get("properties", {}).items():
            found |= {f"{path}.{name}"} | walk(child, f"{path}.{name}")
        return found

    return walk(schema, "")


def test_keys_change_only_with_the_recorded_list() -> None:
    version, *recorded = KEYS.read_text(encoding="utf-8").split()
    found = keys_of(report_schema())
    gone, new = sorted(set(recorded) - found), sorted(found - set(recorded))
    schema = report_schema()
    assert version == f"schema_version={schema['properties']['schema_version']['const']}"
    assert not gone, f"keys are gone: {gone}; raise schema_version, then write tests/report_keys.txt anew"
    assert not new, f"keys are new: {new}; add them to tests/report_keys.txt"


def test_the_report_keeps_to_its_published_schema(reported: Artifact, artifact: Artifact) -> None:
    import jsonschema

    printed = mpcompile("schema", "report")
    assert printed.returncode == 0, printed.stderr
    schema = json.loads(printed.stdout)
    assert schema == report_schema()
    assert schema["title"] == "mpcompile report, schema_version 1"
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    for folder in (reported.folder, artifact.folder):
        content = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        validator.validate(content)
        for broken in ({**content, "extra": 1}, {**content, "schema_version": 2}, {**content, "layers": [{}]}):
            assert not validator.is_valid(broken)


def test_there_are_two_schemas_to_print() -> None:
    refused = mpcompile("schema", "bench")
    assert refused.returncode == 2
    assert "'recipe', 'report'" in refused.stderr


# ---- tables


def test_a_cell_of_markdown_stays_a_cell() -> None:
    table = Table(columns("a", "b|c"), ((Cell("x|y\nz <b>"), shown(None, "{:.1f}", ".k")),), ".")
    assert table.markdown() == "| a | b\\|c |\n|---|---|\n| x\\|y z &lt;b> |  |"
