"""The pages by axe-core's rules: no violation of serious or critical impact, on a phone in light, on a desk in dark."""

import json
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from chromium import Page, browsing, find_chromium

from mpcompile.driver.artifact import Artifact
from mpcompile.driver.compare_runs import compare_runs
from mpcompile.report.compared_page import compared_html
from mpcompile.report.render import html

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed; on Debian: apt install chromium")
RUN = "axe.run({resultTypes: ['violations']}).then(found => JSON.stringify(found.violations))"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    assert CHROMIUM is not None
    with browsing(CHROMIUM, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def axe() -> str:
    """The script of axe-core, which a package carries."""
    found = find_spec("axe_core_python")
    assert found is not None, "pip install axe-core-python"
    assert found.origin is not None
    return (Path(found.origin).parent / "axe.min.js").read_text(encoding="utf-8")


def violations(page: Page, axe: str, path: Path) -> list[tuple[str, str, list[str]]]:
    """Rule, impact and elements of each violation of serious or critical impact, with all folds open."""
    page.open(path)
    page.run("for (const each of document.querySelectorAll('details')) each.open = true")
    page.run(axe)
    found: list[dict[str, Any]] = json.loads(page.run(RUN))
    return [
        (each["id"], each["impact"], [node["html"][:90] for node in each["nodes"]][:5])
        for each in found
        if each["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (1600, "dark")])
def test_the_report_has_no_serious_violation(page: Page, axe: str, reported: Artifact, width: int, scheme: str) -> None:
    page.emulate(scheme=scheme, width=width)
    assert violations(page, axe, reported.folder / "report.html") == []
    page.run("document.querySelector('button.opens').click()")
    assert [each for each in json.loads(page.run(RUN)) if each["impact"] in ("serious", "critical")] == []


def test_a_report_with_warnings_and_a_failed_gate_has_none(
    page: Page, axe: str, reported: Artifact, tmp_path: Path
) -> None:
    gates = tuple(gate.model_copy(update={"holds": False}) for gate in reported.report.gates)
    path = tmp_path / "report.html"
    path.write_text(html(reported.report.model_copy(update={"gates": gates})), encoding="utf-8")
    page.emulate()
    assert violations(page, axe, path) == []


def test_the_page_of_compare_has_none(page: Page, axe: str, reported: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "compare.html"
    other = tmp_path / "other"
    shutil.copytree(reported.folder, other)
    path.write_text(compared_html(compare_runs([reported.folder, other])), encoding="utf-8")
    page.emulate()
    assert violations(page, axe, path) == []


def test_violations_are_noticed(page: Page, axe: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.html"
    path.write_text(
        "<html lang='en'><title>t</title><main><img src='data:,'><p style='color:#ccc'>pale</p></main></html>"
    )
    page.emulate()
    assert {rule for rule, _, _ in violations(page, axe, path)} == {"image-alt", "color-contrast"}
