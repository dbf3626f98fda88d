"""Charts of a run: latency, speedup, tokens, passes and training. Each function returns None if it has no data."""

from mpcompile.measure.timing import INDISTINCT
from mpcompile.report.chart import Bar, Chart, Dot, Label, Line, Mark, Scale, column, error_bar, ticks, x_axis, y_axis
from mpcompile.report.schema import Report

WIDE, NARROW = 1000.0, 480.0


def latency(report: Report) -> Chart | None:
    """Bars of the median latency in ms with its 95 % confidence interval; each batch size has an axis of its own."""
    if not report.latency:
        return None
    marks: list[Mark] = []
    descriptions = []
    top = 0.0
    for pair in report.latency:
        timings = (("dense", pair.dense), ("compressed", pair.compressed))
        scale = Scale(0, 1.05 * max(t.interval_ms[1] for _, t in timings), 90, NARROW - 66)
        bottom = top + 76
        marks.append(Label(0, top + 15, f"batch {pair.dense.batch}", style="strong"))
        marks += x_axis(scale, ticks(0, scale.high, 4), top + 24, bottom)
        for n, (name, t) in enumerate(timings):
            y = top + 30 + 24 * n
            low, high = t.interval_ms
            text = f"{name} {t.p50_ms:.3f} ms, interval {low:.3f} to {high:.3f}"
            marks.append(Bar(scale(0), y, scale(t.p50_ms) - scale(0), 16, name, text))
            marks += error_bar(scale, low, high, y + 8, text)
            marks += [Label(84, y + 12, name, "end"), Label(scale(high) + 8, y + 12, f"{t.p50_ms:.2f} ms")]
            descriptions.append(f"batch {t.batch}: {text}")
        top = bottom + 32
    title = "Median latency in ms a call, with 95 % confidence intervals"
    return Chart(NARROW, top - 8, title, f"{'; '.join(descriptions)}.", tuple(marks))


def speedup(report: Report) -> Chart | None:
    """The speedup over the dense model with its 95 % interval, one row a batch size.

    A grey band marks 1 ± INDISTINCT. If an interval overlaps it, the difference is not significant.
    """
    if not report.latency:
        return None
    batches = [(pair.dense.batch, pair.speedup) for pair in report.latency]
    low = min(1 - 2 * INDISTINCT, *(s.interval[0] for _, s in batches))
    high = max(1 + 2 * INDISTINCT, *(s.interval[1] for _, s in batches))
    scale = Scale(low - 0.05 * (high - low), high + 0.05 * (high - low), 90, NARROW - 120)
    bottom = 24.0 + 28 * len(batches)
    band_start, band_end = 1 - INDISTINCT, 1 + INDISTINCT
    axis = x_axis(scale, ticks(scale.low, scale.high, 4), 16, bottom)
    band = Bar(scale(band_start), 16, scale(band_end) - scale(band_start), bottom - 16, "band")
    marks: list[Mark] = [*axis, band, Line(((scale(1), 16), (scale(1), bottom)), "axis")]
    descriptions = []
    for n, (batch, s) in enumerate(batches):
        y = 36.0 + 28 * n
        text = f"{s.ratio:.2f}× [{s.interval[0]:.2f}, {s.interval[1]:.2f}]"
        marks += error_bar(scale, *s.interval, y, text)
        marks.append(Dot(scale(s.ratio), y, "compressed" if s.significant else "dense", text, 4.5))
        marks += [Label(84, y + 4, f"batch {batch}", "end"), Label(NARROW - 112, y + 4, text)]
        descriptions.append(f"batch {batch}: {text}{s.remark()}")
    marks.append(Label(scale(1), 10, "as fast as dense", "middle", "tick"))
    descriptions.append(
        f"a ratio whose interval overlaps the band from {band_start:.2f} to {band_end:.2f} is not significant"
    )
    title = "Speedup over the dense model, with 95 % confidence intervals"
    return Chart(NARROW, bottom + 22, title, f"{'; '.join(descriptions)}.", tuple(marks))


def tokens(report: Report) -> Chart | None:
    """Bars of the number of tokens that enter each attention and that leave the last one."""
    if not report.merges_tokens():
        return None
    counts = report.cost.tokens
    up, across = Scale(0, 1.12 * max(counts), 130, 6), Scale(-0.5, len(counts) - 0.5, 40, NARROW)
    marks = y_axis(up, ticks(0, up.high, 4), 40, NARROW)
    width = 0.7 * (NARROW - 40) / len(counts)
    for n, count in enumerate(counts):
        last = n == len(counts) - 1
        text = f"{count} tokens " + ("leave the last attention" if last else f"enter attention {n + 1}")
        marks.append(column(up, across(n), width, count, "tone0", text))
        marks.append(Label(across(n), up(count) - 4, str(count), "middle", "tick"))
        marks.append(Label(across(n), 146, "out" if last else str(n + 1), "middle", "tick"))
    description = f"Tokens that enter each attention, and that leave the last: {', '.join(map(str, counts))}."
    return Chart(NARROW, 152, "Tokens at each attention", description, tuple(marks))


def timeline(report: Report) -> Chart | None:
    """A bar for each pass from its start to its end, in seconds since the first pass started."""
    total = sum(row.seconds for row in report.passes)
    if not total:
        return None
    scale, bottom = Scale(0, 1.001 * total, 150, WIDE - 70), 8.0 + 24 * len(report.passes)
    marks = x_axis(scale, ticks(0, scale.high, 8), 4, bottom)
    end = 0.0
    for n, row in enumerate(report.passes):
        y, start = 8.0 + 24 * n, scale(end)
        end += row.seconds
        marks.append(Bar(start, y, max(scale(end) - start, 1), 16, "tone0", f"{row.name}: {row.seconds:.2f} s"))
        marks += [Label(142, y + 12, row.name, "end"), Label(scale(end) + 6, y + 12, f"{row.seconds:.2f} s")]
    description = f"{'; '.join(f'{row.name} {row.seconds:.2f} s' for row in report.passes)}."
    return Chart(WIDE, bottom + 20, "Seconds since the first pass started", description, tuple(marks))


def training(report: Report) -> Chart | None:
    """A line of the mean loss of each epoch, if there are at least two epochs."""
    losses = [row.loss for row in report.epochs]
    if len(losses) < 2:
        return None
    up, across = Scale(0, 1.05 * max(losses) or 1, 130, 10), Scale(0, len(losses) - 1, 56, NARROW - 16)
    marks = y_axis(up, ticks(0, up.high, 4), 44, NARROW)
    points = tuple((across(n), up(loss)) for n, loss in enumerate(losses))
    marks.append(Line(points, "curve"))
    marks += [Dot(x, y, "compressed", f"epoch {n + 1}: {losses[n]:.4f}") for n, (x, y) in enumerate(points)]
    every = -(-len(losses) // 12)  # at most 12 epochs are numbered
    marks += [Label(across(n), 146, str(n + 1), "middle", "tick") for n in range(0, len(losses), every)]
    description = f"From {losses[0]:.4f} in the first epoch to {losses[-1]:.4f} in the last."
    return Chart(NARROW, 152, "Mean loss of each epoch", description, tuple(marks))
