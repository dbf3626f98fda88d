"""report.html in a headless Chromium at the widths of a phone, a tablet and a large screen, and its search and details.

Nothing may reach over the right edge: what is wider scrolls inside its own box.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from chromium import Page, browsing, find_chromium

from mpcompile.driver.artifact import Artifact
from mpcompile.measure.layer_verdict import LayerVerdict
from mpcompile.report.render import html
from mpcompile.report.schema import Report

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed; on Debian: apt install chromium")
LARGEST_BYTES = 2_000_000
# Elements whose right edge is beyond the screen's, and that no box around them scrolls or hides.
OVERFLOWING = """
[...document.body.querySelectorAll("*")].filter(element => {
  if (!element.getClientRects().length || element.getBoundingClientRect().right <= innerWidth + 1) return false;
  for (let box = element.parentElement; box; box = box.parentElement)
    if (["auto", "scroll", "hidden"].includes(getComputedStyle(box).overflowX)) return false;
  return true;
}).map(element => element.outerHTML.slice(0, 90))
"""
VISIBLE = """
[...document.querySelectorAll("#layers-table tbody tr")].filter(row => !row.hidden)
  .map(row => row.cells[0].textContent.trim())
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    assert CHROMIUM is not None
    with browsing(CHROMIUM, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.mark.parametrize("width", [360, 800, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_reaches_over_the_edge(page: Page, reported: Artifact, width: int, scheme: str) -> None:
    page.emulate(scheme=scheme, width=width)
    page.open(reported.folder / "report.html")
    for state in ("false", "true"):
        page.run(f"for (const each of document.querySelectorAll('details')) each.open = {state}")
        assert page.run("document.documentElement.scrollWidth") <= width
        assert page.run(OVERFLOWING) == []
    page.run("document.querySelector('button.opens').click()")
    assert page.run(OVERFLOWING) == []
    assert page.run("document.querySelector('dialog').getBoundingClientRect().width") <= width


def test_a_wide_element_is_noticed(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "wide.html"
    path.write_text(
        "<div style='width: 900px'>wide</div><div style='overflow: auto'><p style='width: 900px'>in a box</p>"
    )
    page.emulate(width=360)
    page.open(path)
    assert len(page.run(OVERFLOWING)) == 1


def test_the_summary_stacks_on_a_phone(page: Page, reported: Artifact) -> None:
    page.emulate(width=360)
    page.open(reported.folder / "report.html")
    box = "document.querySelector('#summary .scroll')"
    assert page.run(f"{box}.scrollWidth <= {box}.clientWidth")  # the column with the difference is there


def test_all_columns_of_the_layers_are_there_on_a_large_screen(page: Page, reported: Artifact) -> None:
    page.emulate(width=1600)
    page.open(reported.folder / "report.html")
    assert page.run("document.getElementById('layers-table').offsetWidth <= document.body.clientWidth")


def test_the_search_shows_the_layers_with_its_words(page: Page, reported: Artifact) -> None:
    page.emulate()
    page.open(reported.folder / "report.html")
    everything = page.run(VISIBLE)
    for words in ("blocks.1", "MLP fc2", "no such layer", ""):
        page.run(f"document.getElementById('layer-search').value = '{words}'")
        page.run("document.getElementById('layer-search').dispatchEvent(new Event('input'))")
        shown = page.run(VISIBLE)
        found = [name for name in everything if all(word in name for word in words.lower().split())]
        assert shown == found
        count = page.run("document.getElementById('layer-count').value")
        assert count == (f"{len(found)} of {len(everything)} layers" if words else "")


def test_a_click_on_a_layer_shows_its_details(page: Page, reported: Artifact) -> None:
    report = reported.report
    page.emulate()
    page.open(reported.folder / "report.html")
    number = next(n for n, row in enumerate(report.layers) if row.spectrum and row.missed is not None)
    row, title = report.layers[number], "document.getElementById('layer-title').textContent"
    article = "document.querySelector('dialog article:not([hidden])')"
    assert not page.run("document.querySelector('dialog').open")
    # From the table after sorting, so that rows are not in network order.
    page.run("document.querySelectorAll('#layers-table thead button')[1].click()")
    page.run(f"document.querySelector('#layers-table button[data-layer=\"{number}\"]').click()")
    assert page.run("document.querySelector('dialog').open")
    assert page.run(title) == row.name
    text = page.run("document.querySelector('dialog').innerText")
    assert row.spectrum is not None
    for expected in (f"{row.spectrum.edge:.4g}", f"{100 * (row.missed or 0):.3f} %", "×".join(map(str, row.shape))):
        assert expected in text
    assert page.run(f"{article}.querySelectorAll('polyline.red').length") == 1  # the edge in the picture
    page.run("document.getElementById('layer-after').click()")
    assert page.run(title) == report.layers[number + 1].name
    page.run("document.querySelector('dialog').close()")
    # From the bars.
    page.run(f"document.querySelector('#loss-chart-title').parentElement.querySelector('rect[data-layer=\"{number}\"]')"
             ".dispatchEvent(new MouseEvent('click', {bubbles: true}))")  # fmt: skip
    assert page.run("document.querySelector('dialog').open")
    assert page.run(title) == row.name
    assert page.complaints() == []


def test_the_button_copies_the_command(page: Page, reported: Artifact) -> None:
    page.emulate()
    page.open(reported.folder / "report.html")
    page.run("document.querySelector('[data-copies=command-line]').click()")
    page.run("new Promise(done => setTimeout(done, 200))")
    assert page.run("document.querySelector('[data-copies=command-line]').textContent") in ("Copied", "Selected")


def large(report: Report, count: int) -> Report:
    """The report with `count` layers, each of which has a fit, a share in the certificate and a verdict."""
    given = [row for row in report.layers if row.spectrum]
    names = [f"vision_model.encoder.layers.{n // 6}.block.part{n % 6}" for n in range(count)]
    assert report.certificate is not None
    first, reason = report.certificate.layers[0], "the native kernel is 1.54 (1.53–1.55) times as fast as the dense one"
    verdict = LayerVerdict("", "val_8", "MatMul", "2:4", True, "measured", reason, True, "NMGemm, avx512", 0.05, 0.03)
    shares = tuple(replace(first, name=name) for name in names)
    return report.model_copy(
        update={
            "layers": tuple(given[n % len(given)].model_copy(update={"name": name}) for n, name in enumerate(names)),
            "certificate": replace(report.certificate, layers=shares),
            "verdicts": tuple(replace(verdict, layer=name) for name in names),
        }
    )


def test_the_page_of_400_layers_is_small_and_quick(page: Page, reported: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(html(large(reported.report, 400)), encoding="utf-8")
    assert path.stat().st_size < LARGEST_BYTES
    page.emulate(width=360)
    page.open(path)
    assert page.run(OVERFLOWING) == []
    assert len(page.run(VISIBLE)) == 400
    loaded_ms = page.run("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd")
    assert math.isfinite(loaded_ms)
    assert 0 < loaded_ms < 10_000  # 0.3 s on an idle machine
