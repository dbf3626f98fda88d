"""The top of a report: warnings, the verdict in one sentence, four tiles, and the lines that run the files."""

import html
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_page import jq, read_number

from mpcompile.driver.artifact import Artifact
from mpcompile.driver.compare_runs import compare_runs
from mpcompile.measure.timing import Speedup
from mpcompile.report import render
from mpcompile.report.deploy import command_line, snippets
from mpcompile.report.explained_layer import explain, one_line_each
from mpcompile.report.headline import headline, warnings
from mpcompile.report.quantized_schema import Quantized, Variant
from mpcompile.report.schema import Gate, Report
from mpcompile.report.table import Cell
from mpcompile.report.tile import Tile, plain
from mpcompile.report.tiles import tiles

NAMES = re.compile(r"int8|fp8|fp32|fp16|top-1|Top-1|95 %")  # digits that are no results
KEYED = re.compile(r'<(?:span|dd|td)[^>]*? data-key="([^"]*)"[^>]*>(?:<a[^>]*>)?([^<]*)<')


def tile(report: Report, name: str) -> Tile:
    [found] = [one for one in tiles(report) if one.id == name]
    return found


def with_speeds(report: Report, *intervals: tuple[float, float]) -> Report:
    """The report with these intervals of the speedup over dense, one for each batch size."""
    pairs = zip(report.latency, intervals, strict=True)
    latency = [p.model_copy(update={"speedup": Speedup(sum(i) / 2, i, 40, "dense")}) for p, i in pairs]
    return report.model_copy(update={"latency": tuple(latency)})


def in_int8(report: Report, *intervals: tuple[float, float]) -> Report:
    """The report as that of a model in int8, with these intervals of the speedup over dense int8."""
    over = tuple(Speedup(sum(i) / 2, i, 40, "int8, mpcompile") for i in intervals)
    rows = (Variant("int8, mpcompile", "static", timings=tuple(p.dense for p in report.latency)),)
    recipe = report.recipe.model_copy(update={"precision": "int8"})
    return report.model_copy(update={"quantized": Quantized("int8", None, rows, over), "recipe": recipe})


def test_every_number_of_the_top_stands_in_the_report(reported: Artifact) -> None:
    for report in (reported.report, in_int8(reported.report, (1.1, 1.2), (0.8, 0.9))):
        content: Any = json.loads(report.model_dump_json())
        cells = [part for phrase in (headline(report), *_phrases(report)) for part in phrase]
        layers = re.compile("|".join(re.escape(row.name) for row in report.layers))  # names may have numbers
        for part in cells:
            if isinstance(part, Cell):
                assert part.key is not None
                shown, half = read_number(part.text)
                assert abs(jq(content, part.key) - shown) <= half * (1 + 1e-9) + 1e-12, part
                assert part.value == pytest.approx(jq(content, part.key)), part
            else:
                assert not re.search(r"\d", NAMES.sub("", layers.sub("", part))), part
        for one in tiles(report):
            assert not re.search(r"\d", NAMES.sub("", f"{one.title} {one.word} {one.todo}")), one
        assert sum(isinstance(part, Cell) for part in cells) > 25


def _phrases(report: Report) -> list[Any]:
    return [phrase for one in tiles(report) for phrase in (one.figure, *one.lines)]


def test_every_keyed_number_of_the_page_is_that_of_the_report(reported: Artifact) -> None:
    content: Any = json.loads(reported.report.model_dump_json())
    found = KEYED.findall(render.html(reported.report))
    for key, text in found:
        shown, half = read_number(text)
        expected = jq(content, html.unescape(key))
        assert abs(expected - shown) <= half * (1 + 1e-9) + 1e-12, (key, text)
    assert len(found) > 25 + 8 * len(reported.report.layers)  # the top, and the details of each layer


@pytest.mark.parametrize(
    ("intervals", "state", "word"),
    [
        (((1.2, 1.3), (1.1, 1.2)), "good", "faster than dense in fp32"),
        (((0.5, 0.6), (0.7, 0.8)), "bad", "slower than dense in fp32"),
        (((1.2, 1.3), (0.9, 1.1)), "unsure", "differs by batch size"),
        (((0.9, 1.1), (0.95, 1.02)), "fact", "no significant difference"),
    ],
)
def test_the_tile_of_speed_judges_all_batch_sizes(reported: Artifact, intervals: Any, state: str, word: str) -> None:
    found = tile(with_speeds(reported.report, *intervals), "speed")
    assert (found.state, found.word) == (state, word)
    assert "Against dense int8: not measured" in found.todo
    assert "--precision int8" in found.todo


def test_a_model_that_is_slower_than_dense_int8_is_not_shown_as_faster(reported: Artifact) -> None:
    fast = with_speeds(reported.report, (2.0, 2.2), (2.0, 2.2))
    found = tile(in_int8(fast, (0.8, 0.9), (1.1, 1.2)), "speed")
    assert (found.state, found.word) == ("unsure", "faster than dense in fp32, slower than dense int8")
    assert [plain(line) for line in found.lines[-2:]] == [
        "against dense int8, batch 1: 0.85× [0.80, 0.90]",
        "against dense int8, batch 2: 1.15× [1.10, 1.20]",
    ]
    assert found.todo == ""
    assert "as fast as dense int8 at batch 1 [0.80, 0.90]" in plain(headline(in_int8(fast, (0.8, 0.9), (1.1, 1.2))))


def test_a_failed_gate_is_a_warning_above_all(reported: Artifact) -> None:
    gate = Gate(name="top-1 drop in points", limit=0.5, found=3.25, holds=False)
    report = reported.report.model_copy(update={"gates": (gate,)})
    assert warnings(report)[0] == "The run fails a gate: top-1 drop in points is 3.25; 0.5 is allowed."
    found = tile(report, "accuracy")
    assert (found.state, found.word) == ("bad", "gate fails")
    page = render.html(report)
    assert page.index("The run fails a gate") < page.index('class="headline"')
    text = render.markdown(report)
    assert text.index("> [!WARNING]") < text.index("**The compressed model")
    assert 'class="warning"' not in render.html(reported.report)


def test_a_significant_loss_is_bad_without_a_gate(reported: Artifact) -> None:
    c = reported.report.comparison
    assert c is not None
    assert c.turned is not None
    assert c.dense is not None
    worse = replace(
        c,
        turned=replace(c.turned, right=0, wrong=9, chance=0.004),
        compressed=replace(c.dense, top1=c.dense.top1 - 0.1),
    )
    report = reported.report.model_copy(update={"comparison": worse, "gates": ()})
    assert (tile(report, "accuracy").state, tile(report, "accuracy").word) == ("bad", "significant loss")


def test_what_was_not_measured_says_so_and_how_to_measure_it(artifact: Artifact) -> None:
    bare = artifact.report.model_copy(update={"comparison": None, "latency": (), "idle": "there is no GPU"})
    found = {one.id: one for one in tiles(bare)}
    assert {name for name, one in found.items() if one.state == "none"} == {"accuracy", "speed", "proof"}
    assert "--data IMAGES" in found["accuracy"].todo
    assert found["speed"].todo.startswith("There is no GPU. Run mpcompile bench OUT")
    assert plain(headline(bare)) == "The compressed model was not timed; its accuracy was not measured."
    page = html.unescape(render.html(bare))
    assert page.count("not measured") >= 2


def test_the_lines_of_python_run_in_the_folder(reported: Artifact) -> None:
    found = {one.id: one for one in snippets(reported.report)}
    assert {"without-library", "artifact"} <= set(found)
    for name in {"without-library", "with-library"} & set(found):
        words = [sys.executable, "-c", f"{found[name].text}\nprint(outputs[0].shape)"]
        done = subprocess.run(words, cwd=reported.folder, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "(1, 10)"


def test_the_command_is_quoted_for_a_shell(reported: Artifact) -> None:
    assert command_line(reported.report) is None
    assert "was started from Python" in render.html(reported.report)
    told = reported.report.model_copy(update={"command_line": ("mpcompile", "my model.pt", "--pattern", "2:4")})
    assert command_line(told) == "mpcompile 'my model.pt' --pattern 2:4"
    assert "mpcompile 'my model.pt' --pattern 2:4" in html.unescape(render.html(told))
    assert "mpcompile 'my model.pt' --pattern 2:4" in render.markdown(told)


def test_commands_of_tensorrt_are_shown(reported: Artifact) -> None:
    report = reported.report.model_copy(update={"commands": ("trtexec --onnx=model.onnx --sparsity=enable",)})
    [found] = [one for one in snippets(report) if one.id == "tensorrt"]
    assert found.text == "trtexec --onnx=model.onnx --sparsity=enable"


def test_reports_and_artifacts_show_themselves_in_a_notebook(reported: Artifact) -> None:
    shown = reported._repr_html_()
    assert reported.report._repr_html_() in shown
    assert html.escape(str(reported.folder)) in shown
    assert shown.count('class="tile ') == 4
    assert "<script" not in shown
    hostile = reported.report.model_copy(update={"model": replace(reported.report.model, arch="<img src=x>")})
    assert "<img" not in hostile._repr_html_()


@pytest.mark.skipif(shutil.which("cmark-gfm") is None, reason="cmark-gfm is not installed; apt install cmark-gfm")
def test_markdown_is_rendered_by_github_without_a_collapsed_line(reported: Artifact, tmp_path: Path) -> None:
    gate = Gate(name="top-1 drop in points", limit=0.5, found=3.25, holds=False)
    text = render.markdown(reported.report.model_copy(update={"gates": (gate,)}))
    words = ["cmark-gfm", "--unsafe", "--extension", "table", "--extension", "tagfilter", "--hardbreaks"]
    page = subprocess.run(words, input=text, capture_output=True, text=True, check=True, timeout=60).stdout
    assert "<br" not in page.replace("[!WARNING]<br />", "")  # GitHub breaks lines where the source does
    code = re.findall(r"<pre>.*?</pre>", page, re.DOTALL)
    prose = re.sub(r"<pre>.*?</pre>", "", page, flags=re.DOTALL)
    assert not re.search(r"^\|", prose, re.MULTILINE)  # every table became one
    assert "**" not in prose
    assert "```" not in prose
    assert page.count("<details>") == page.count("</details>") == text.count("<summary>") >= 12
    assert page.count("<tr>") == len(re.findall(r"^\|(?!---)", text, re.MULTILINE))
    assert len(code) == text.count("```") / 2
    # Before the first folded section there are the verdict, four numbers and one table.
    top = page.split("<details>")[0]
    assert top.count("<table>") == 1
    assert top.count("<li>") == 4 + 1  # with the warning


def test_real_runs_are_compared_and_every_layer_is_explained(artifact: Artifact, reported: Artifact) -> None:
    """Both are of one model, on 2,000 and on 64 of its images."""
    found = compare_runs([artifact.folder, reported.folder], ["top1 < dense - 50", "speedup < 0.001"])
    facts = {row.fact for row in found.differences}
    assert "the evaluation images" in facts
    assert not facts & {"the dense models", "the machines", "the versions of the runtime"}
    assert {row.state for row in found.conditions} == {"holds"}
    for one in (artifact, reported):
        c = one.report.comparison
        assert c is not None
        assert c.images_sha256 is not None
        assert len(one_line_each(one.report)) == len(one.report.layers)
        for row in one.report.layers:
            topics = [topic for topic, _ in explain(one.report, row).sentences]
            assert {"layer", "pattern"} <= set(topics)
            assert ("kernel" in topics) == (row.pattern is not None)
            assert ("refit" in topics) == (row.missed is not None)
