"""The demo: `make demo` compiles the example in fp32 and in int8, and prints one table of both reports."""

import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
from doc_pages import ROOT, parse

from mpcompile.driver.artifact import Artifact
from mpcompile.measure.timing import Speedup
from mpcompile.report.schema import FileRow, Report


@pytest.fixture
def demo() -> Iterator[ModuleType]:
    """The script benchmarks/demo.py as a module."""
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(ROOT / "benchmarks"))
        import demo

        yield demo
    sys.modules.pop("demo")


def with_speedups(report: Report, *intervals: tuple[float, float]) -> Report:
    """The report with these intervals of the speedup over dense, one for each batch size."""
    speedups = [Speedup(sum(interval) / 2, interval, 20, "dense") for interval in intervals]
    latency = [row.model_copy(update={"speedup": s}) for row, s in zip(report.latency, speedups, strict=True)]
    return report.model_copy(update={"latency": tuple(latency)})


def test_make_demo_compiles_what_the_table_shows(demo: ModuleType) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    recipe = re.findall(r"^demo: .*\n((?:\t.*\n)+)", makefile, re.MULTILINE)[0]
    compiled = [shlex.split(line)[1:] for line in recipe.splitlines() if "$(BIN)/mpcompile" in line]
    for words in compiled:
        parse(words)
    folders = {("int8" if "int8" in words else "fp32"): words[words.index("--output") + 1] for words in compiled}
    assert folders == demo.FOLDERS
    assert recipe.rstrip().endswith("$(BIN)/python benchmarks/demo.py")


def test_the_table_has_the_numbers_of_both_reports(demo: ModuleType, int8_masked: Artifact) -> None:
    int8 = with_speedups(int8_masked.report, (2.4, 2.6), (2.9, 3.1))
    fp32 = with_speedups(int8_masked.report, (1.2, 1.4), (0.9, 1.1))
    quantized = int8.quantized
    assert quantized is not None
    over = (Speedup(1.05, (1.02, 1.08), 20, "int8, static"), Speedup(1.0, (0.9, 1.1), 20, "int8, mpcompile"))
    int8 = int8.model_copy(update={"quantized": replace(quantized, over_fastest=over)})
    rows = {row[0]: row[1:] for row in demo.table(fp32, int8)}
    ours, static = quantized.baselines[0], quantized.baselines[2]
    assert int8.comparison is not None
    assert rows["top-1"][2] == f"{ours.top1:.2%}"
    assert rows["same answer as dense fp32"] == (
        "", f"{int8.comparison.agreement:.2%}", f"{ours.agreement:.2%}", f"{int8.comparison.agreement:.2%}"
    )  # fmt: skip
    sizes = {row.name: f"{row.bytes / 1e6:.2f} MB" for row in int8.files}
    assert rows["ONNX file"] == tuple(sizes[n] for n in ("dense.onnx", "model.onnx", "dense_int8.onnx", "model.onnx"))
    beside = rows["batch 1, beside dense fp32"]
    assert (beside[1], beside[3]) == ("1.30× [1.20, 1.40]", "2.50× [2.40, 2.60]")
    assert f"{static.speedups[0].interval[0]:.2f}" in beside[2]  # the fastest at batch 1
    assert rows["batch 1, beside dense int8"][2:] == (
        f"{static.timings[0].p50_ms:.2f} ms",
        "1.05× [1.02, 1.08], not significant",
    )
    assert rows["batch 2, beside dense fp32"][1] == "no difference [0.90, 1.10]"
    assert rows["batch 2, beside dense int8"][3] == "no difference [0.90, 1.10]"
    assert len(rows) == 3 + 2 * 2
    assert all(len(row) == len(demo.COLUMNS) - 1 for row in rows.values())


def test_a_file_that_was_not_faster_is_named(demo: ModuleType, int8_masked: Artifact) -> None:
    files = [row for row in int8_masked.report.files if row.name != "model.native.onnx"]
    report = int8_masked.report.model_copy(update={"files": tuple(files)})
    assert demo.kernels(report).startswith("int8: no model.native.onnx, because no file with the N:M kernel was")
    native = FileRow(name="model.native.onnx", bytes=1, sha256="")
    verdicts = [replace(row, chosen=n == 0) for n, row in enumerate(report.verdicts)]
    shipped = report.model_copy(update={"files": (*files, native), "verdicts": tuple(verdicts)})
    count = len(verdicts)
    assert demo.kernels(shipped) == f"int8: 1 of {count} masked layers run on the N:M kernel (model.native.onnx)."
