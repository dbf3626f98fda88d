"""Renders a Report as Markdown and as one HTML page with the same tables and sentences; the page also has charts."""

import base64
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mpcompile.report.confidence_tables as confidence_tables
import mpcompile.report.layer_bars as layer_bars
import mpcompile.report.layer_charts as layer_charts
import mpcompile.report.layer_tables as layers
import mpcompile.report.quantized_table as quantized_table
import mpcompile.report.run_charts as charts
import mpcompile.report.run_tables as tables
import mpcompile.report.search_chart as search_chart
from mpcompile.report.changed_cards import changed_cards, changed_table
from mpcompile.report.chart import Chart
from mpcompile.report.confidence_chart import reliability
from mpcompile.report.deploy import command_line, snippets
from mpcompile.report.frontier_chart import frontier
from mpcompile.report.graph_picture import graph_picture
from mpcompile.report.head_words import agreement_sentence
from mpcompile.report.headline import headline, warnings
from mpcompile.report.layer_cards import cards
from mpcompile.report.markdown_blocks import folded, unwrapped
from mpcompile.report.quantized_sentences import methods
from mpcompile.report.report_hashes import write_hashes
from mpcompile.report.schema import Report
from mpcompile.report.sentences import command, command_terms, proven, searched, which_recipe
from mpcompile.report.table import verdict_table
from mpcompile.report.tile import plain
from mpcompile.report.tiles import tiles

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"


def write(report: Report, folder: Path) -> None:
    """Writes report.json, report.md and report.html into a folder, and their hashes (report.sha256)."""
    (folder / "report.json").write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(markdown(report), encoding="utf-8")
    (folder / "report.html").write_text(html(report), encoding="utf-8")
    write_hashes(folder)


def markdown(report: Report) -> str:
    """The report as Markdown."""
    return folded(
        unwrapped(template_environment(escaping=False).get_template("report.md.j2").render(_variables(report)))
    )


def html(report: Report) -> str:
    """The report as one HTML page that loads nothing else. Names of models and layers are escaped."""
    page = template_environment(escaping=True).get_template("report.html.j2")
    return page.render(
        _variables(report),
        charts=charts,
        layer_charts=layer_charts,
        frontier=frontier(report),
        loss_bars=layer_bars.loss(report),
        speed_bars=layer_bars.speed(report),
        cards=cards(report),
        graph=graph_picture(report),
        changed_cards=changed_cards(report),
        reliability=reliability(report),
        search_chart=search_chart.tuning(report.tuning) if report.tuning else None,
        **page_parts("page.js", "layer_dialog.js"),
    )


def fragment(report: Report) -> str:
    """Warnings, verdict and tiles as a piece of HTML for a notebook: it has its own colours and no script."""
    variables = _variables(report)
    return (
        template_environment(escaping=True)
        .get_template("notebook.html.j2")
        .render(variables, style=template_text("notebook.css"))
    )


def svg(chart: Chart) -> str:
    """A chart as an SVG file of its own, with its title, its background and the colours of the light or dark scheme."""
    template = template_environment(escaping=True).get_template("chart.svg.j2")
    return template.render(chart=chart, style=template_text("chart.css"))


def _variables(report: Report) -> dict[str, Any]:
    """The variables of both report templates."""
    return {
        "report": report,
        "tiles": tiles(report),
        "headline": headline(report),
        "warnings": warnings(report),
        "snippets": snippets(report),
        "plain": plain,
        "command_line": command_line(report),
        "recipe": report.recipe.to_yaml(),
        "tables": tables,
        "layers": layers,
        "confidence_tables": confidence_tables,
        "versions": quantized_table.versions(report) if report.quantized else None,
        "methods": methods(report.quantized) if report.quantized else (),
        "verdict_table": verdict_table,
        "proven": proven(report.certificate) if report.certificate else (),
        "agreement": agreement_sentence(report.comparison) if report.comparison else "",
        "changed_table": changed_table(report),
        "tuning": searched(report.tuning) if report.tuning else "",
        "which_recipe": which_recipe(report.tuning) if report.tuning else (),
        "command": command(report),
        "command_terms": command_terms(report),
    }


def page_parts(*scripts: str) -> dict[str, str]:
    """The style and the scripts of a page, as variables of its template.

    The Content-Security-Policy allows only the script with this hash, so that a script in a name cannot run.
    """
    script = "\n".join(map(template_text, scripts))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style = template_text("chart.css") + template_text("report.css")
    return {"style": style, "script": script, "script_sha256": digest}


def template_text(name: str) -> str:
    """The text of a file of the templates."""
    return (TEMPLATES / name).read_text(encoding="utf-8")


def template_environment(escaping: bool) -> "Environment":
    """The templates; with `escaping`, names cannot open a tag."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=escaping,
    )
    made.filters["px"] = "{:.2f}".format  # coordinates of charts
    return made
