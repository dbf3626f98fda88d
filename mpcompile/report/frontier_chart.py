"""Chart of accuracy against speed on held-out images: dense, dense in 8 bits, and the compressed model."""

from mpcompile.report.chart import Chart
from mpcompile.report.head_words import accuracy_name
from mpcompile.report.schema import Report
from mpcompile.report.search_chart import accuracy_speed
from mpcompile.report.search_schema import Point


def frontier(report: Report) -> Chart | None:
    """The versions that the run measured, as points; None if accuracy or speed was not measured."""
    c = report.comparison
    if c is None or not report.latency:
        return None
    compressed = tuple(pair.speedup for pair in report.latency)
    if c.metric is not None:
        point = Point("compressed", drop=c.metric.drop, speedups=compressed, holds=True)
        least = abs(c.metric.drop) or 1e-3
        return _chart(report, point, (), measure=c.metric.name, unit="", least=least)
    if c.dense is None or c.compressed is None:
        return None
    point = Point("compressed", drop=100 * (c.dense.top1 - c.compressed.top1), speedups=compressed, holds=True)
    rows = report.quantized.baselines if report.quantized else ()
    references = [
        Point(f"dense {row.name}", drop=100 * (c.dense.top1 - row.top1), speedups=row.speedups)
        for row in rows
        if row.top1 is not None and row.speedups
    ]
    measure = f"{accuracy_name(c.head)} in percentage points"
    return _chart(report, point, tuple(references), measure=measure, unit=" points", least=0.2)


def _chart(
    report: Report, point: Point, references: tuple[Point, ...], *, measure: str, unit: str, least: float
) -> Chart:
    lowest = -1.2 * max(0.0, *(one.drop or 0.0 for one in (point, *references))) - least
    return accuracy_speed(
        [point],
        ["compressed"],
        references,
        limit=report.recipe.gates.max_drop,
        lowest=lowest,
        speed="speedup over dense" + (", mean of the batch sizes" if len(report.latency) > 1 else ""),
        chosen="compressed",
        measure=measure,
        unit=unit,
        least=least,
    )
