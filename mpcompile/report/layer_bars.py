"""Bar charts with one bar a layer, in network order: the loss and the speed of each. None if there is no data."""

from collections.abc import Sequence

from mpcompile.report.chart import Bar, Chart, Label, Line, Mark, Number, Scale, ticks, y_axis
from mpcompile.report.layer_values import losses
from mpcompile.report.schema import LayerRow, Report

WIDE, LEFT, TOP, BOTTOM = 1000.0, 48.0, 10.0, 130.0


def loss(report: Report) -> Chart | None:
    """What each layer adds to the change of the outputs: its share in the certificate, else its refit error."""
    found = losses(report)
    if found is None:
        return None
    values = [found.values.get(row.name) for row in report.layers]
    return _bars(report.layers, values, f"Loss: {found.title}, layers in network order", found.form)


def speed(report: Report) -> Chart | None:
    """How many times as fast each layer runs on the target, or its time in 8 bits."""
    measured = {row.layer: row.times_as_fast if row.chosen else 1.0 for row in report.verdicts if row.times_as_fast}
    values = [measured.get(row.shares_weight_with or row.name) for row in report.layers]
    if any(value is not None for value in values):
        title = "Speed: times as fast on its kernel as on the dense kernel, layers in network order"
        return _bars(report.layers, values, title, "{:.2f}×", baseline=1.0)
    times = {row.layer: row.ms for row in report.quantized.kernels if row.ms} if report.quantized else {}
    values = [times.get(row.name) for row in report.layers]
    if any(value is not None for value in values):
        return _bars(report.layers, values, "Speed: milliseconds a call, layers in network order", "{:.3f} ms")
    return None


def _bars(
    rows: Sequence[LayerRow], values: Sequence[float | None], title: str, form: str, baseline: Number | None = None
) -> Chart:
    """A bar for each layer with a value, at least one; a grey tick for each without one.

    `baseline` draws a line at a value.
    """
    known = [(value, row.name) for value, row in zip(values, rows, strict=True) if value is not None]
    most, name = max(known)
    low, high = min(0.0, min(known)[0]), max(most, baseline or 0.0, 1e-12)
    up, across = Scale(low, 1.05 * high, BOTTOM, TOP), Scale(-0.5, len(rows) - 0.5, LEFT, WIDE)
    marks: list[Mark] = y_axis(up, ticks(low, up.high, 4), LEFT, WIDE, "{:.0%}" if form.endswith("%}") else "{:g}")
    width = min(0.78 * (WIDE - LEFT) / len(rows), 26.0)
    for n, (row, value) in enumerate(zip(rows, values, strict=True)):
        text = f"{row.name}: {'no value' if value is None else form.format(value)}"
        x = across(n) - width / 2
        if value is None:
            marks.append(Bar(x, up(0) - 2, width, 2, "other", text, n))
            continue
        top, bottom = sorted((up(value), up(0)))
        style = "dense" if baseline is not None and value == baseline else "tone0"
        marks.append(Bar(x, top, width, max(bottom - top, 0.75), style, text, n))
    if baseline is not None:
        marks.append(Line(((LEFT, up(baseline)), (WIDE, up(baseline))), "axis", "as fast as dense"))
    marks.append(Label(LEFT, BOTTOM + 18, rows[0].name, style="tick"))
    if len(rows) > 1:
        marks.append(Label(WIDE, BOTTOM + 18, rows[-1].name, "end", "tick"))
    description = f"{len(known)} of {len(rows)} layers have a value; the largest is {form.format(most)}, of {name}."
    return Chart(WIDE, BOTTOM + 24, title, description, tuple(marks))
