"""The example of a pipeline for GitHub Actions: it is a workflow, and its commands parse against the real ones."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from commandline import mpcompile
from doc_pages import PAGES, parse
from small_reports import comparison, int8_report, small_report, write

from mpcompile.report.conditions import parse_condition

WORKFLOW = Path(__file__).parents[1] / "examples" / "github-actions.yml"
TEXT = WORKFLOW.read_text(encoding="utf-8")
EXPRESSION = re.compile(r"\$\{\{.*?\}\}")
# The keys of GitHub's workflow syntax that an example may use.
TOP = {"name", "on", "permissions", "concurrency", "env", "jobs"}
JOB = {"name", "runs-on", "timeout-minutes", "steps", "if", "env", "needs", "strategy"}
STEP = {"name", "id", "if", "uses", "with", "run", "env", "shell", "working-directory", "continue-on-error"}


@pytest.fixture(scope="module")
def workflow() -> dict[str, Any]:
    content = yaml.safe_load(TEXT)
    assert isinstance(content, dict)
    return {"on" if key is True else key: value for key, value in content.items()}  # YAML 1.1 reads on as a truth value


@pytest.fixture(scope="module")
def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    [job] = workflow["jobs"].values()
    return list(job["steps"])


def lines(script: str) -> list[list[str]]:
    """The words of every line of a shell script, its continuations joined."""
    return [words for line in script.replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))]


def commands(steps: list[dict[str, Any]]) -> list[list[str]]:
    """The arguments of every `mpcompile` in the workflow."""
    return [words[1:] for step in steps for words in lines(step.get("run", "")) if words[0] == "mpcompile"]


def test_it_has_the_shape_of_a_workflow(workflow: dict[str, Any]) -> None:
    assert "\t" not in TEXT
    assert set(workflow) <= TOP
    assert {"on", "jobs", "name"} <= set(workflow)
    assert set(workflow["on"]) <= {"push", "pull_request", "workflow_dispatch", "schedule"}
    assert workflow["permissions"] == {"contents": "read"}  # it needs no more
    for name, job in workflow["jobs"].items():
        assert re.fullmatch(r"[a-zA-Z_][\w-]*", name)
        assert set(job) <= JOB
        assert {"runs-on", "steps", "timeout-minutes"} <= set(job)
        assert job["steps"]
        for step in job["steps"]:
            assert set(step) <= STEP, step
            assert ("uses" in step) != ("run" in step), step
            assert "with" not in step or "uses" in step
            if "uses" in step:
                assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"])
            else:
                assert step["name"]
    assert all(re.search(r"github\.\w+|cancelled\(\)", found) for found in EXPRESSION.findall(TEXT))


def test_scripts_are_shell(steps: list[dict[str, Any]]) -> None:
    shell = shutil.which("bash")
    assert shell
    for step in steps:
        if "run" in step:
            assert not EXPRESSION.search(step["run"]), "an expression in a script is run as code"
            done = subprocess.run([shell, "-n"], input=step["run"], text=True, capture_output=True, check=False)
            assert done.returncode == 0, (step["name"], done.stderr)


def test_every_command_is_understood_by_the_real_command_line(steps: list[dict[str, Any]]) -> None:
    found = commands(steps)
    assert [words[0] for words in found] == ["compile", "compile", "compare"]
    for words in found:
        parse(words)


def test_it_compares_the_folders_that_it_compiles(steps: list[dict[str, Any]]) -> None:
    *compiled, compare = commands(steps)
    written = [words[words.index("-o") + 1] for words in compiled]
    assert compare[1 : 1 + len(written)] == written
    conditions = [compare[n + 1] for n, word in enumerate(compare) if word == "--fail-if"]
    assert len(conditions) >= 3
    for text in conditions:
        assert parse_condition(text)


def test_the_report_is_shown_also_after_a_failure(steps: list[dict[str, Any]]) -> None:
    names = [step.get("name", "") for step in steps]
    [shown] = [step for step in steps if "GITHUB_STEP_SUMMARY" in step.get("run", "")]
    assert names.index(shown["name"]) > next(n for n, name in enumerate(names) if name.startswith("Compare"))
    assert shown["if"] == "${{ !cancelled() }}"


def test_the_summary_has_the_reports_that_there_are(steps: list[dict[str, Any]], tmp_path: Path) -> None:
    [shown] = [step for step in steps if "GITHUB_STEP_SUMMARY" in step.get("run", "")]
    (tmp_path / "out" / "int8").mkdir(parents=True)
    (tmp_path / "out" / "int8" / "report.md").write_text("# the report\n")
    summary = tmp_path / "summary.md"
    environment = {"GITHUB_STEP_SUMMARY": str(summary), "PATH": "/usr/bin:/bin"}
    words = ["bash", "-e", "-o", "pipefail", "-c", shown["run"]]  # as GitHub runs it; out/fp32 was not written
    subprocess.run(words, cwd=tmp_path, env=environment, check=True)
    assert summary.read_text() == "# the report\n"


@pytest.mark.parametrize(("drop", "code"), [(0.004, 0), (0.006, 6)])
def test_the_comparison_passes_and_fails_as_a_pipeline_would(
    steps: list[dict[str, Any]], tmp_path: Path, drop: float, code: int
) -> None:
    c = comparison(top1=0.8825 - drop, dense=0.8825)
    write(small_report(comparison=c), tmp_path / "out" / "fp32")
    write(int8_report(comparison=c), tmp_path / "out" / "int8")
    [compare] = [words for words in commands(steps) if words[0] == "compare"]
    done = mpcompile(*compare, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "out" / "compare.html").is_file()
    failed = [line for line in done.stderr.splitlines() if "is true" in line]
    assert len(failed) == (2 if code else 0)
    assert all("'top1 < dense - 0.5' is true: top1 is 87.65 %, 0.1 percentage points below" in line for line in failed)


def test_the_page_on_comparing_leads_to_it() -> None:
    assert "(../examples/github-actions.yml)" in PAGES["comparing"]
