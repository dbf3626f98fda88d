"""A report as Markdown and as one HTML page: the same tables and sentences, and charts where they can be drawn."""

import base64
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mpcompile.report.layer_tables as layers
import mpcompile.report.run_charts as charts
import mpcompile.report.run_tables as tables
import mpcompile.report.search_chart as tuning_chart
from mpcompile.report.schema import Report
from mpcompile.report.sentences import command, command_terms, proven, searched
from mpcompile.report.table import verdict_table

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"


def markdown(report: Report) -> str:
    """The report as Markdown."""
    return _environment(escaping=False).get_template("report.md.j2").render(_known(report))


def html(report: Report) -> str:
    """The report as one HTML page that loads nothing; names of models and layers are text in it, whatever they hold."""
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    # The page allows this script alone: one that came in with a name would not run.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = _environment(escaping=True).get_template("report.html.j2")
    return page.render(
        _known(report),
        charts=charts,
        search_chart=tuning_chart.tuning(report.tuning) if report.tuning else None,
        style=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
        script=script,
        script_sha256=digest,
    )


def _known(report: Report) -> dict[str, Any]:
    """What both templates have."""
    return {
        "report": report,
        "tables": tables,
        "layers": layers,
        "verdict_table": verdict_table,
        "proven": proven(report.certificate) if report.certificate else (),
        "tuning": searched(report.tuning) if report.tuning else "",
        "command": command(report),
        "command_terms": command_terms(report),
    }


def _environment(escaping: bool) -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=escaping,
    )
