"""The charts of a report, from the numbers in report.json alone. None where there is nothing to draw."""

import math
from collections.abc import Sequence

from mpcompile.measure.timing import INDISTINCT
from mpcompile.report.chart import Bar, Chart, Dot, Label, Line, Number, Scale, across, ticks, upward
from mpcompile.report.schema import LayerRow, Report

WIDE, NARROW = 1000.0, 480.0
TONES = 4  # patterns told apart by tone; more share the last


def latency(report: Report) -> Chart | None:
    """Bars from zero with the interval of the median at their ends; each batch has its own axis."""
    if not report.latency:
        return None
    bars, lines, labels, words = [], [], [], []
    top = 0.0
    for pair in report.latency:
        sides = (("dense", pair.dense), ("compressed", pair.compressed))
        scale = Scale(0, 1.05 * max(t.interval_ms[1] for _, t in sides), 90, NARROW - 66)
        bottom = top + 76
        grid, numbers = across(scale, ticks(0, scale.high, 4), top + 24, bottom)
        lines += grid
        labels += [Label(0, top + 15, f"batch {pair.dense.batch}", kind="strong"), *numbers]
        for row, (name, t) in enumerate(sides):
            y = top + 30 + 24 * row
            low, high = t.interval_ms
            told = f"{name} {t.p50_ms:.3f} ms, interval {low:.3f} to {high:.3f}"
            bars.append(Bar(scale(0), y, scale(t.p50_ms) - scale(0), 16, name, told))
            lines += _interval(scale, low, high, y + 8, told)
            labels += [Label(84, y + 12, name, "end"), Label(scale(high) + 8, y + 12, f"{t.p50_ms:.2f} ms")]
            words.append(f"batch {t.batch}: {told}")
        top = bottom + 32
    title = "Median milliseconds a call, with 95 % intervals"
    return Chart(NARROW, top - 8, title, f"{'; '.join(words)}.", tuple(bars), tuple(lines), (), tuple(labels))


def speedup(report: Report) -> Chart | None:
    """How many times as fast as dense, a row a batch; what lies within the band is told from no noise."""
    if not report.latency:
        return None
    found = [(pair.dense.batch, pair.speedup) for pair in report.latency]
    low = min(1 - 2 * INDISTINCT, *(s.interval[0] for _, s in found))
    high = max(1 + 2 * INDISTINCT, *(s.interval[1] for _, s in found))
    scale = Scale(low - 0.05 * (high - low), high + 0.05 * (high - low), 90, NARROW - 120)
    bottom = 24.0 + 28 * len(found)
    grid, numbers = across(scale, ticks(scale.low, scale.high, 4), 16, bottom)
    band = Bar(scale(1 - INDISTINCT), 16, scale(1 + INDISTINCT) - scale(1 - INDISTINCT), bottom - 16, "band")
    lines, dots, labels, words = [*grid, Line(((scale(1), 16), (scale(1), bottom)), "axis")], [], [*numbers], []
    for row, (batch, s) in enumerate(found):
        y = 36.0 + 28 * row
        told = f"{s.ratio:.2f}× [{s.interval[0]:.2f}, {s.interval[1]:.2f}]"
        lines += _interval(scale, *s.interval, y, told)
        dots.append(Dot(scale(s.ratio), y, "compressed" if s.significant else "dense", told, 4.5))
        labels += [Label(84, y + 4, f"batch {batch}", "end"), Label(NARROW - 112, y + 4, told)]
        words.append(f"batch {batch}: {told}" + ("" if s.significant else ", not told from noise"))
    labels.append(Label(scale(1), 10, "as fast as dense", "middle", "tick"))
    title = "Times as fast as the dense model, with 95 % intervals"
    words.append(f"the band is {1 - INDISTINCT:.2f} to {1 + INDISTINCT:.2f}, where no difference is told")
    return Chart(NARROW, bottom + 22, title, f"{'; '.join(words)}.", (band,), tuple(lines), tuple(dots), tuple(labels))


def _interval(scale: Scale, low: Number, high: Number, y: Number, about: str) -> list[Line]:
    """A whisker with its ends."""
    return [
        Line(((scale(low), y), (scale(high), y)), "whisker", about),
        *(Line(((scale(end), y - 4), (scale(end), y + 4)), "whisker") for end in (low, high)),
    ]


def budget(report: Report) -> Chart | None:
    """Layers in their order, each as wide as its share of the dense MACs and filled as high as its share that is left.

    The area is then what the compressed model still multiplies. Last comes what is in no layer: products of attention.
    """
    dense = report.cost.dense
    known = [row for row in report.layers if row.macs]
    if not known:
        return None
    tones = {pattern: min(n, TONES - 1) for n, pattern in enumerate(patterns(report))}
    across_, up = Scale(0, 1, 50, WIDE - 20), Scale(0, 1, 200, 12)
    lines, labels = upward(up, (0, 0.25, 0.5, 0.75, 1), 50, WIDE - 20, "{:.0%}")
    _, numbers = across(across_, (0, 0.2, 0.4, 0.6, 0.8, 1), 12, 200, "{:.0%}")
    bars, done = [], 0.0
    for row in known:
        assert row.macs is not None
        assert row.macs_left is not None
        x, width, kept = across_(done), across_(row.macs / dense) - across_(0), row.macs_left / row.macs
        told = f"{row.name}: {row.pattern or 'dense'}, {row.macs / dense:.1%} of the MACs, {kept:.0%} of them left"
        tone = f"tone{tones[row.pattern]}" if row.pattern else "dense"
        bars += [
            Bar(x, up(1), width, up(0) - up(1), "empty", told),
            Bar(x, up(kept), width, up(0) - up(kept), tone, told),
        ]
        done += row.macs / dense
    rest, left = dense - sum(row.macs or 0 for row in known), report.cost.compressed - _left(known)
    if rest > 1e-3 * dense:
        told = f"in no layer: {rest / dense:.1%} of the MACs, {left / rest:.0%} of them left"
        x, width = across_(done), across_(rest / dense) - across_(0)
        bars += [
            Bar(x, up(1), width, up(0) - up(1), "empty", told),
            Bar(x, up(left / rest), width, up(0) - up(left / rest), "other", told),
        ]
    labels += [
        *numbers,
        Label((30 + WIDE) / 2, 234, "share of the dense model's MACs, layers in their order", "middle"),
    ]
    words = (
        f"{report.cost.compressed / dense:.1%} of the multiply-accumulates are left. Each layer's are in the table of "
        "layers."
    )
    return Chart(WIDE, 240, "What is left of each layer's MACs", words, tuple(bars), tuple(lines), (), tuple(labels))


def patterns(report: Report) -> tuple[str, ...]:
    """The patterns of masked layers, in the order in which they first come."""
    return tuple(dict.fromkeys(row.pattern for row in report.layers if row.pattern))


def _left(rows: Sequence[LayerRow]) -> Number:
    return sum(row.macs_left or 0 for row in rows)


def distance(report: Report) -> Chart | None:
    """How far each fitted layer is from the Marchenko–Pastur law, beside the same entries shuffled."""
    fitted = [(row.name, row.spectrum) for row in report.layers if row.spectrum]
    if not fitted:
        return None
    high = max(max(s.fit_error, s.null_error or 0) for _, s in fitted)
    up, place = Scale(0, 1.05 * high or 1, 150, 10), _places(len(fitted))
    lines, labels = upward(up, ticks(0, up.high, 4), 44, WIDE)
    dots = []
    for n, (name, s) in enumerate(fitted):
        if s.null_error is not None:
            y = up(s.null_error)
            told = f"{name}, shuffled: {s.null_error:.3f}"
            lines.append(Line(((place(n) - 5, y), (place(n) + 5, y)), "null", told))
        dots.append(Dot(place(n), up(s.fit_error), "compressed", f"{name}: {s.fit_error:.3f}"))
    labels += _ends([name for name, _ in fitted], 168)
    errors = sorted(s.fit_error for _, s in fitted)
    nulls = sorted(s.null_error for _, s in fitted if s.null_error is not None)
    words = f"{len(fitted)} layers are {errors[0]:.3f} to {errors[-1]:.3f} from the law"
    words += f"; their shuffled entries {nulls[0]:.3f} to {nulls[-1]:.3f}." if nulls else "."
    title = "Distance from the Marchenko–Pastur law, layers in their order"
    return Chart(WIDE, 174, title, words, (), tuple(lines), tuple(dots), tuple(labels))


def spikes(report: Report) -> Chart | None:
    """The share of each fitted layer's singular values past the edge that noise passes with 5 % probability."""
    fitted = [(row, row.spectrum) for row in report.layers if row.spectrum]
    if not fitted:
        return None
    shares = [s.spikes / min(row.shape[0], math.prod(row.shape[1:])) for row, s in fitted]
    up, place = Scale(0, 1.1 * max(shares) or 1, 110, 10), _places(len(fitted))
    lines, labels = upward(up, ticks(0, up.high, 3), 44, WIDE, "{:.0%}")
    width = min(0.7 * (WIDE - 44) / len(fitted), 24)
    bars = [
        Bar(
            place(n) - width / 2, up(share), width, up(0) - up(share), "tone0",
            f"{row.name}: {s.spikes} of {min(row.shape[0], math.prod(row.shape[1:]))}, {share:.1%}",
        )
        for n, ((row, s), share) in enumerate(zip(fitted, shares, strict=True))
    ]  # fmt: skip
    labels += _ends([row.name for row, _ in fitted], 128)
    words = f"{min(shares):.1%} to {max(shares):.1%} of the singular values are spikes."
    title = "Share of singular values that are spikes, layers in their order"
    return Chart(WIDE, 134, title, words, tuple(bars), tuple(lines), (), tuple(labels))


def _places(count: int) -> Scale:
    """The middle of each of so many columns."""
    return Scale(-0.5, count - 0.5, 44, WIDE)


def _ends(names: Sequence[str], y: Number) -> list[Label]:
    """The first and the last name below an axis of layers."""
    first = [Label(44, y, names[0], "start", "tick")]
    return first if len(names) == 1 else [*first, Label(WIDE, y, names[-1], "end", "tick")]


def tokens(report: Report) -> Chart | None:
    """How many tokens enter each attention, and how many leave the last."""
    if not report.merges_tokens():
        return None
    counts = report.cost.tokens
    up, place = Scale(0, 1.12 * max(counts), 130, 6), Scale(-0.5, len(counts) - 0.5, 40, NARROW)
    lines, labels = upward(up, ticks(0, up.high, 4), 40, NARROW)
    width = 0.7 * (NARROW - 40) / len(counts)
    bars = []
    for n, count in enumerate(counts):
        where = f"enter attention {n + 1}" if n < len(counts) - 1 else "leave the last"
        bars.append(Bar(place(n) - width / 2, up(count), width, up(0) - up(count), "tone0", f"{count} {where}"))
        labels.append(Label(place(n), up(count) - 4, str(count), "middle", "tick"))
        labels.append(Label(place(n), 146, str(n + 1) if n < len(counts) - 1 else "out", "middle", "tick"))
    words = f"Tokens that enter each attention, and that leave the last: {', '.join(map(str, counts))}."
    return Chart(NARROW, 152, "Tokens at each attention", words, tuple(bars), tuple(lines), (), tuple(labels))


def timeline(report: Report) -> Chart | None:
    """When each pass ran, in seconds since the first began."""
    total = sum(row.seconds for row in report.passes)
    if not total:
        return None
    scale, bottom = Scale(0, 1.001 * total, 120, WIDE - 70), 8.0 + 24 * len(report.passes)
    lines, labels = across(scale, ticks(0, scale.high, 8), 4, bottom)
    bars, done = [], 0.0
    for n, row in enumerate(report.passes):
        y, start = 8.0 + 24 * n, scale(done)
        done += row.seconds
        bars.append(Bar(start, y, max(scale(done) - start, 1), 16, "tone0", f"{row.name}: {row.seconds:.2f} s"))
        labels += [Label(112, y + 12, row.name, "end"), Label(scale(done) + 6, y + 12, f"{row.seconds:.2f} s")]
    words = f"{'; '.join(f'{row.name} {row.seconds:.2f} s' for row in report.passes)}."
    title = "Seconds since the first pass began"
    return Chart(WIDE, bottom + 20, title, words, tuple(bars), tuple(lines), (), tuple(labels))


def training(report: Report) -> Chart | None:
    """The mean loss of each epoch."""
    losses = [row.loss for row in report.epochs]
    if len(losses) < 2:
        return None
    up, place = Scale(0, 1.05 * max(losses) or 1, 130, 10), Scale(0, len(losses) - 1, 56, NARROW - 16)
    lines, labels = upward(up, ticks(0, up.high, 4), 44, NARROW)
    points = tuple((place(n), up(loss)) for n, loss in enumerate(losses))
    lines.append(Line(points, "curve"))
    dots = tuple(Dot(x, y, "compressed", f"epoch {n + 1}: {losses[n]:.4f}") for n, (x, y) in enumerate(points))
    every = -(-len(losses) // 12)
    labels += [Label(place(n), 146, str(n + 1), "middle", "tick") for n in range(0, len(losses), every)]
    words = f"From {losses[0]:.4f} in the first epoch to {losses[-1]:.4f} in the last."
    return Chart(NARROW, 152, "Mean loss of each epoch", words, (), tuple(lines), dots, tuple(labels))
