"""report.html in a headless Chromium: it loads no other file, sorts by number, and is readable in light and dark."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from chromium import Page, browsing, find_chromium

import mpcompile
from mpcompile.driver.artifact import Artifact
from mpcompile.report.render import html
from mpcompile.report.schema import Report

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed; on Debian: apt install chromium")
READABLE = 4.5  # least contrast of body text, WCAG 2.2, 1.4.3
COLUMN = "[...document.querySelectorAll('#layers-table tbody tr')].map(row => row.cells[{}].textContent.trim())"
HEADERS = "[...document.querySelectorAll('#layers-table thead th')].map(head => head.textContent.trim())"
COLOURS = """
(() => {
  const background = element => {
    for (let node = element; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if (colour !== "rgba(0, 0, 0, 0)") return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const selectors = ["p.headline", "p.facts", "section p", "p.caption",
    ".tile-title", ".tile-figure", ".tile.good .tile-word", ".tile.fact .tile-word", ".tile li", ".todo", "button.copy",
    "button.opens", "ul.verdict li", "thead th", "tbody td", "tbody td a", "td small",
    "pre", "footer p", "nav a", "a.source", "p.holds", "figcaption"];
  return selectors.map(selector => document.querySelector(selector)).filter(element => element)
    .map(element => [element.tagName + "." + element.className, getComputedStyle(element).color, background(element)]);
})()
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    assert CHROMIUM is not None
    with browsing(CHROMIUM, tmp_path_factory.mktemp("profile")) as page:
        page.emulate()
        yield page


def luminance(colour: str) -> float:
    """The relative luminance of an opaque colour, as defined by WCAG."""
    red, green, blue = (int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(","))
    linear = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in (red, green, blue))
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours, from 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def check_page(page: Page, path: Path) -> None:
    """Asserts no console message, no other request, no horizontal overflow, and a description for every chart."""
    for width in (1100, 390):
        page.emulate(width=width)
        page.open(path)
        assert page.complaints() == []
        assert page.requests() == [path.resolve().as_uri()]
        assert page.run("document.documentElement.scrollWidth") <= width
    charts = page.run(
        "[...document.querySelectorAll('svg[role=img]')].map(svg => svg.getAttribute('aria-labelledby').split(' '))"
    )
    assert charts
    for title, description in charts:
        assert page.run(f"document.getElementById('{title}').textContent.length") > 10
        assert page.run(f"document.getElementById('{description}').textContent.length") > 20


def check_sorting(page: Page) -> None:
    """Asserts that a click sorts by number, largest first, a second click reverses, and aria-sort follows."""
    for name in ("kept", "spikes"):
        column = page.run(HEADERS).index(name)
        before = page.run(COLUMN.format(column))
        header = f"document.querySelectorAll('#layers-table thead th')[{column}]"
        assert page.run(f"{header}.getAttribute('aria-sort')") == "none"
        for order in ("descending", "ascending"):
            page.run(f"{header}.querySelector('button').click()")
            assert page.run(f"{header}.getAttribute('aria-sort')") == order
            after = page.run(COLUMN.format(column))
            assert sorted(after) == sorted(before)
            texts = [text for text in after if text]
            numbers = [float(text.removesuffix(" %")) for text in texts]
            assert numbers == sorted(numbers, reverse=order == "descending")
            assert after[len(texts) :] == [""] * (len(after) - len(texts))  # layers without a fit come last
            if name == "kept":
                lexical = sorted(texts, reverse=order == "descending")
                assert texts != lexical  # 100.0 % and 50.0 %: sorting as text would differ
    assert page.run("document.querySelectorAll('#layers-table th:not([aria-sort=none])[aria-sort]').length") == 1


def test_the_page_loads_no_other_file_and_fits_the_screen(page: Page, reported: Artifact) -> None:
    check_page(page, reported.folder / "report.html")


def test_console_messages_and_requests_are_noticed(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "bad.html"
    path.write_text("<script>console.error('no')</script><img src='missing.png'>")
    page.open(path)
    assert any("no" in message for message in page.complaints())
    assert len(page.requests()) == 2


def test_the_table_of_layers_sorts_by_number(page: Page, reported: Artifact) -> None:
    page.open(reported.folder / "report.html")
    check_sorting(page)


def test_keys_sort_like_clicks(page: Page, reported: Artifact) -> None:
    page.open(reported.folder / "report.html")
    page.run("document.querySelector('#layers-table thead button').focus()")
    page.key("Enter", "\r")
    names = page.run(COLUMN.format(0))
    assert names == page.run(f"{COLUMN.format(0)}.sort((a, b) => a.localeCompare(b, 'en', {{numeric: true}}))")
    assert page.run("document.querySelector('#layers-table thead th').getAttribute('aria-sort')") == "ascending"
    page.key("Tab")  # to the next header
    page.key(" ", " ")
    assert page.run(
        "[...document.querySelectorAll('#layers-table thead th')].map(head => head.ariaSort).slice(0, 2)"
    ) == [
        "none",
        "descending",
    ]


def test_light_and_dark_differ_and_both_are_readable(page: Page, reported: Artifact) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        page.emulate(scheme=scheme)
        page.open(reported.folder / "report.html")
        colours[scheme] = page.run(COLOURS)
        assert len(colours[scheme]) >= 13
        for element, text, background in colours[scheme]:
            assert contrast(text, background) >= READABLE, (scheme, element, text, background)
    page.emulate()
    for (element, *light), (_, *dark) in zip(colours["light"], colours["dark"], strict=True):
        assert light[0] != dark[0], element
        assert luminance(light[1]) > 0.8, element
        assert luminance(dark[1]) < 0.1, element


def test_printing_opens_all_details(page: Page, reported: Artifact, tmp_path: Path) -> None:
    page.open(reported.folder / "report.html")
    assert page.run("document.querySelectorAll('details[open]').length") == 1  # how to run the fastest file
    page.run("dispatchEvent(new Event('beforeprint'))")
    assert page.run("document.querySelectorAll('details:not([open])').length") == 0
    page.run("dispatchEvent(new Event('afterprint'))")
    assert page.run("document.querySelectorAll('details[open]').length") == 1
    page.pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")


def test_a_script_in_a_name_does_not_run(page: Page, reported: Artifact, tmp_path: Path) -> None:
    report = reported.report
    name = "<script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\">"
    layer = report.layers[3].model_copy(update={"name": name, "reason": name})
    spectra = report.layers[4].model_copy(update={"name": name})
    hostile = report.model_copy(
        update={
            "model": replace(report.model, name=name, arch=name),
            "layers": (*report.layers[:3], layer, spectra, *report.layers[5:]),
            "environment": {**report.environment, "device": name},
        }
    )
    path = tmp_path / "report.html"
    path.write_text(html(hostile), encoding="utf-8")
    page.open(path)
    assert page.run("document.title") == f"{name}, compressed by mpcompile"
    assert page.run("document.querySelector('h1').textContent") == name
    assert page.run("document.querySelectorAll('img:not([src^=\"data:image/jpeg\"])').length") == 0
    assert name in page.run(COLUMN.format(0))
    assert page.complaints() == []
    assert page.requests() == [path.as_uri()]


def test_the_content_security_policy_stops_an_injected_script(page: Page, reported: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    injected = "<script>document.title = 'run'</script></body>"
    path.write_text(html(reported.report).replace("</body>", injected), encoding="utf-8")
    page.open(path)
    assert page.run("document.title") != "run"
    assert any("Content Security Policy" in message for message in page.complaints())


@pytest.mark.slow
def test_the_report_of_a_pretrained_vit_s(page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page of a model of realistic size: twelve blocks of pretrained weights, fitted and certified.

    The images are given without labels, since the head of the model is not trained.
    """
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import lib.pretrained as pretrained

    try:
        module = pretrained.Resized(pretrained.vit_small(112), 384, 112).eval()
    except SystemExit as missing:
        pytest.skip(str(missing))
    module.pretrained_cfg = {"input_size": (1, 28, 28), "mean": (0.5,), "std": (0.5,)}  # type: ignore[assignment]
    recipe = mpcompile.Recipe.checked(
        {
            "passes": [
                {"mp-budget": {"patterns": ["2:4"]}},
                {"nm-mask": {"criterion": "magnitude", "refit": "none"}},
                "certify",
            ],
            "bench": {"batches": [1], "seconds": 0.05},
        }
    )
    data = pretrained.fashion_data(calibration=16)
    few = replace(data, held_out=replace(data.held_out, order=data.held_out.order[:32], labelled=False))
    artifact = mpcompile.compile(module, recipe, data=few, output=tmp_path / "out")
    check_page(page, artifact.folder / "report.html")
    check_sorting(page)
    assert Report.read(artifact.folder).spectra()
    sys.modules.pop("pretrained")
