"""`mpcompile compare` as a pipeline runs it: table, JSON, page, exit codes, and conditions on standard error."""

import json
from pathlib import Path

import pytest
from commandline import mpcompile, refused
from small_reports import ENVIRONMENT, int8_report, small_report, write

from mpcompile.report.compared_schema import ComparedRuns
from mpcompile.report.report_hashes import HASHES
from mpcompile.system.hashing import file_sha256


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A folder with the reports `fp32` and `int8`."""
    write(small_report(), tmp_path / "fp32")
    write(int8_report(), tmp_path / "int8")
    return tmp_path


def test_two_runs_are_one_table(folders: Path) -> None:
    done = mpcompile("compare", "fp32", "int8", cwd=folders)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for text in ("dense", "88.25 %", "87.60 %", "1.33×", "1.04×", "2.91 MB", "99.10 %", "not measured"):
        assert text in done.stdout, text
    assert "blocks.0.attn.qkv" not in done.stdout
    assert "blocks.0.attn.qkv" in mpcompile("compare", "fp32", "int8", "--layers", cwd=folders).stdout
    assert mpcompile("compare", "fp32", "--quiet", cwd=folders).stdout == ""


def test_a_single_folder_is_compared_with_its_dense_model(folders: Path) -> None:
    done = mpcompile("compare", "fp32", cwd=folders)
    assert done.returncode == 0
    assert "Not comparable" not in done.stdout
    assert "88.25 %" in done.stdout


def test_runs_on_two_machines_are_said_to_be_not_comparable(folders: Path) -> None:
    write(small_report(environment={**ENVIRONMENT, "processor": "Xeon"}), folders / "xeon")
    done = mpcompile("compare", "fp32", "xeon", cwd=folders)
    assert done.stdout.startswith("† Not comparable in speed: the machines differ. fp32: AMD EPYC, 2 cores")
    assert "Columns with † cannot be compared" in done.stdout


def test_json_is_the_whole_comparison_and_nothing_else(folders: Path) -> None:
    done = mpcompile("compare", "fp32", "int8", "--json", "--fail-if", "top1 < 50", cwd=folders)
    assert done.returncode == 0
    found = ComparedRuns.model_validate_json(done.stdout)
    assert [run.name for run in found.runs] == ["fp32", "int8"]
    assert json.loads(done.stdout)["runs"][0]["metrics"]["top1"] == [
        {"value": 87.6, "dense": 88.25, "interval": None, "batch": None}
    ]
    assert [row.state for row in found.conditions] == ["holds", "holds"]


def test_the_page_is_written_and_named(folders: Path) -> None:
    done = mpcompile("compare", "fp32", "int8", "--html", "compare.html", cwd=folders)
    assert "Written to compare.html" in done.stdout
    assert (folders / "compare.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    lost = mpcompile("compare", "fp32", "--html", "no/such/folder.html", cwd=folders)
    refused(lost, 2, "no/such/folder.html cannot be written: No such file or directory; give another file with --html")


def test_every_failed_condition_has_a_line_and_the_command_fails(folders: Path) -> None:
    options = ("--fail-if", "top1 < dense - 0.5", "--fail-if", "speedup@1 < 1.2", "--fail-if", "proven < 99.5")
    done = mpcompile("compare", "fp32", "int8", "--quiet", *options, cwd=folders)
    assert done.returncode == 6
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "mpcompile: fp32: 'top1 < dense - 0.5' is true: top1 is 87.6 %, 0.15 percentage points below dense - 0.5, "
        "which is 87.75 %",
        "mpcompile: int8: 'top1 < dense - 0.5' is true: top1 is 87.6 %, 0.15 percentage points below dense - 0.5, "
        "which is 87.75 %",
        "mpcompile: fp32: 'proven < 99.5' is true: proven is 99.1 %, 0.4 percentage points below 99.5 %",
        "mpcompile: int8: 'proven < 99.5' is true: proven is 99.1 %, 0.4 percentage points below 99.5 %",
        "mpcompile: 4 of 6 checks of --fail-if failed; the lines above say by how much",
    ]
    assert "88.25 %" in mpcompile("compare", "fp32", *options, cwd=folders).stdout  # the table is printed all the same


def test_a_metric_that_was_not_measured_fails(folders: Path) -> None:
    done = mpcompile("compare", "fp32", "int8", "--quiet", "--fail-if", "speedup_int8 < 1", cwd=folders)
    assert done.returncode == 6
    assert done.stderr.splitlines()[0] == (
        "mpcompile: fp32: 'speedup_int8 < 1' cannot be checked: speedup_int8 was not measured; compile with "
        "--precision int8"
    )


def test_mistakes_are_refused_before_a_folder_is_read(folders: Path) -> None:
    refused(mpcompile("compare", "no", "--fail-if", "tp1 < 3", cwd=folders), 2, "did you mean 'top1'?")
    refused(mpcompile("compare", "fp32", "fp32/", cwd=folders), 2, "fp32 is there twice; give different output folders")
    refused(mpcompile("compare", "no", cwd=folders), 3, "no has no report.json; give an output folder of mpcompile")
    assert mpcompile("compare", cwd=folders).returncode == 2


def test_a_report_that_was_edited_or_damaged_is_refused(folders: Path) -> None:
    report = folders / "fp32" / "report.json"
    hashes = "".join(f"{file_sha256(report)}  {name}\n" for name in ("report.json", "report.md", "report.html"))
    (folders / "fp32" / HASHES).write_text(hashes)
    assert mpcompile("compare", "fp32", cwd=folders).returncode == 0  # report.json alone is needed
    report.write_text(report.read_text().replace("0.876", "0.976"))
    refused(
        mpcompile("compare", "fp32", cwd=folders), 3, "was changed: its SHA-256 differs from the one in report.sha256"
    )
    (folders / "int8" / "report.json").write_text("{}")
    refused(mpcompile("compare", "int8", cwd=folders), 3, "int8/report.json is not a report of this version")
    (folders / "int8" / "report.json").write_bytes(b"\x80")
    refused(mpcompile("compare", "int8", cwd=folders), 3, "int8/report.json")


def test_nothing_of_the_folder_but_the_report_is_opened(folders: Path) -> None:
    """A pickle, an ONNX file or a recipe beside the report is not read."""
    for name in ("model.onnx", "recipe.yaml", "model.safetensors"):
        (folders / "fp32" / name).mkdir()
    assert mpcompile("compare", "fp32", cwd=folders).returncode == 0
