"""Renders ComparedRuns as one HTML page in the style of report.html."""

import mpcompile.report.compared_tables as tables
from mpcompile.measure.timing import Speedup
from mpcompile.report.chart import Chart
from mpcompile.report.compared_schema import ComparedRun, ComparedRuns
from mpcompile.report.render import page_parts, template_environment
from mpcompile.report.search_chart import accuracy_speed
from mpcompile.report.search_schema import Point

CAPTION = "Brackets are 95 % confidence intervals. Speed is beside the dense model of the same run."
MARKED = " Columns with † cannot be compared between the runs."


def compared_html(found: ComparedRuns) -> str:
    """The comparison as one HTML page that loads nothing else. Names of runs and layers are escaped."""
    page = template_environment(escaping=True).get_template("compare.html.j2")
    return page.render(
        found=found,
        title=title_of(found),
        tables=tables,
        latency=tables.latency_table(found),
        caption=caption_of(found),
        chart=accuracy_chart(found),
        warned=any(run.warnings for run in found.runs),
        failed=[row for row in found.conditions if row.state != "holds"],
        content=found.model_dump_json(indent=1),
        **page_parts("page.js"),
    )


def title_of(found: ComparedRuns) -> str:
    """The architectures and the number of runs."""
    names = ", ".join(dict.fromkeys(run.arch for run in found.runs))
    return f"{names}: {len(found.runs)} runs" if len(found.runs) > 1 else names


def caption_of(found: ComparedRuns) -> str:
    """What the main table shows."""
    return CAPTION + (MARKED if found.differences else "")


def accuracy_chart(found: ComparedRuns) -> Chart | None:
    """The change of accuracy or of the metric of each run against its speed.

    None if no run has both, or if the runs cannot be compared in one of them.
    """
    if found.spoiled("accuracy") or found.spoiled("speed"):
        return None
    by_metric = any("metric_change" in run.metrics for run in found.runs)
    key = "metric_change" if by_metric else "top1_change"
    points = [point for point in (_point(run, key) for run in found.runs) if point is not None]
    if not points:
        return None
    drops = [abs(point.drop or 0) for point in points]
    least = (max(drops) or 1e-3) if by_metric else 0.2
    several = any(len(point.speedups) > 1 for point in points)
    name = next(run.accuracy_name for run in found.runs if key in run.metrics)
    return accuracy_speed(
        points,
        [point.name for point in points],
        lowest=-1.2 * max(drops) - least,
        speed="speedup over dense" + (", mean of the batch sizes" if several else ""),
        measure=name if by_metric else f"{name} in percentage points",
        unit="" if by_metric else " points",
        least=least,
    )


def _point(run: ComparedRun, key: str) -> Point | None:
    """A run as a point of the chart."""
    changes, speeds = run.metrics.get(key, ()), run.metrics.get("speedup", ())
    if not changes or not speeds:
        return None
    found = (Speedup(s.value, s.interval or (s.value, s.value), 0, "dense") for s in speeds)
    return Point(run.name, drop=-changes[0].value, speedups=tuple(found), holds=True)
