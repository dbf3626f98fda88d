"""Charts with one mark a layer: MAC budget, fit to the Marchenko–Pastur law, spikes. None if there is no data."""

import math
from collections.abc import Sequence

from mpcompile.ir.results import Spectrum
from mpcompile.report.chart import Bar, Chart, Dot, Label, Line, Mark, Number, Scale, column, ticks, y_axis
from mpcompile.report.schema import LayerRow, Report

WIDE = 1000.0
TONES = 4  # colours for patterns; from the fourth pattern on, all have the last colour


def budget(report: Report) -> Chart | None:
    """One column for each layer: its width is its share of the dense MACs, its filled height the share that remains.

    The filled area is therefore the MACs of the compressed model. The last column has the MACs that belong to no layer:
    the matrix products of attention.
    """
    dense = report.cost.dense
    counted = [(row, row.macs, row.macs_left) for row in report.layers if row.macs and row.macs_left is not None]
    if not counted:
        return None
    tones = {pattern: min(n, TONES - 1) for n, pattern in enumerate(patterns(report))}
    across, up = Scale(0, 1, 50, WIDE - 20), Scale(0, 1, 200, 12)
    marks = y_axis(up, (0, 0.25, 0.5, 0.75, 1), 50, WIDE - 20, "{:.0%}")
    marks += [
        Label(across(v), 215, f"{v:.0%}", "middle", "tick") for v in (0, 0.2, 0.4, 0.6, 0.8, 1)
    ]  # without grid lines: the columns have vertical edges already
    start = 0.0
    for row, macs, left in counted:
        style = f"tone{tones[row.pattern]}" if row.pattern else "dense"
        marks += _share(across, up, start, macs / dense, left / macs, style, f"{row.name}: {row.pattern or 'dense'}")
        start += macs / dense
    rest = dense - sum(macs for _, macs, _ in counted)
    rest_left = report.cost.compressed - sum(left for _, _, left in counted)
    if rest > 1e-3 * dense:
        marks += _share(across, up, start, rest / dense, rest_left / rest, "other", "in no layer")
    marks.append(Label((30 + WIDE) / 2, 234, "share of the dense model's MACs, layers in model order", "middle"))
    description = (
        f"{report.cost.compressed / dense:.1%} of the multiply-accumulates remain. The table of layers has the share "
        "of each layer."
    )
    return Chart(WIDE, 240, "MACs that remain in each layer", description, tuple(marks))


def _share(across: Scale, up: Scale, start: float, width: float, kept: float, style: str, name: str) -> list[Mark]:
    """The column of one layer: an empty bar, and over it the filled bar of the share `kept`."""
    text = f"{name}, {width:.1%} of the MACs, {kept:.0%} of them remain"
    x, size = across(start), across(width) - across(0)
    return [
        Bar(x, up(1), size, up(0) - up(1), "empty", text),
        Bar(x, up(kept), size, up(0) - up(kept), style, text),
    ]


def patterns(report: Report) -> tuple[str, ...]:
    """The patterns of the masked layers, in the order of their first layers."""
    return tuple(dict.fromkeys(row.pattern for row in report.layers if row.pattern))


def distance(report: Report) -> Chart | None:
    """The distance of each fitted layer from the Marchenko–Pastur law, and that of its shuffled entries."""
    fitted = _fitted(report)
    if not fitted:
        return None
    high = max(max(s.fit_error, s.null_error or 0) for _, s in fitted)
    up, across = Scale(0, 1.05 * high or 1, 150, 10), _layer_scale(len(fitted))
    marks = y_axis(up, ticks(0, up.high, 4), 44, WIDE)
    for n, (row, s) in enumerate(fitted):
        x = across(n)
        if s.null_error is not None:
            y = up(s.null_error)
            marks.append(Line(((x - 5, y), (x + 5, y)), "red", f"{row.name}, shuffled: {s.null_error:.3f}"))
        marks.append(Dot(x, up(s.fit_error), "compressed", f"{row.name}: {s.fit_error:.3f}"))
    errors = sorted(s.fit_error for _, s in fitted)
    nulls = sorted(s.null_error for _, s in fitted if s.null_error is not None)
    description = f"{len(fitted)} layers have distances from {errors[0]:.3f} to {errors[-1]:.3f}"
    description += f"; their shuffled entries from {nulls[0]:.3f} to {nulls[-1]:.3f}." if nulls else "."
    title = "Distance from the Marchenko–Pastur law, layers in model order"
    return Chart(WIDE, 174, title, description, (*marks, *_first_and_last(fitted, 168)))


def spikes(report: Report) -> Chart | None:
    """For each fitted layer, the share of its singular values above the noise edge (spikes)."""
    fitted = _fitted(report)
    if not fitted:
        return None
    counts = [min(row.shape[0], math.prod(row.shape[1:])) for row, _ in fitted]
    shares = [s.spikes / count for (_, s), count in zip(fitted, counts, strict=True)]
    up, across = Scale(0, 1.1 * max(shares) or 1, 110, 10), _layer_scale(len(fitted))
    marks = y_axis(up, ticks(0, up.high, 3), 44, WIDE, "{:.0%}")
    width = min(0.7 * (WIDE - 44) / len(fitted), 24)
    for n, ((row, s), count, share) in enumerate(zip(fitted, counts, shares, strict=True)):
        text = f"{row.name}: {s.spikes} of {count}, {share:.1%}"
        marks.append(column(up, across(n), width, share, "tone0", text))
    description = f"{min(shares):.1%} to {max(shares):.1%} of the singular values are spikes."
    title = "Share of singular values that are spikes, layers in model order"
    return Chart(WIDE, 134, title, description, (*marks, *_first_and_last(fitted, 128)))


def _fitted(report: Report) -> list[tuple[LayerRow, Spectrum]]:
    return [(row, row.spectrum) for row in report.layers if row.spectrum]


def _layer_scale(count: int) -> Scale:
    """Layer number -> x at the middle of its column."""
    return Scale(-0.5, count - 0.5, 44, WIDE)


def _first_and_last(fitted: Sequence[tuple[LayerRow, Spectrum]], y: Number) -> list[Label]:
    """The names of the first and the last layer below the axis; there is no room for all."""
    first, last = Label(44, y, fitted[0][0].name, style="tick"), Label(WIDE, y, fitted[-1][0].name, "end", "tick")
    return [first] if len(fitted) == 1 else [first, last]
