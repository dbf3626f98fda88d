"""The tile of accuracy against the dense model: top-1, the user's own metric, or errors of values."""

from mpcompile.measure.comparison import Comparison
from mpcompile.report.head_words import accuracy_name, same_answer_name, shift_name
from mpcompile.report.schema import Gate, Report
from mpcompile.report.table import Cell, number
from mpcompile.report.tile import Phrase, State, Tile, interval

KEY = ".comparison"


def accuracy(report: Report) -> Tile:
    """How far decisions or outputs moved on held-out images, with the gates of the recipe."""
    c = report.comparison
    if c is None:
        todo = "No images were given. Run the same command with --data IMAGES to measure it."
        return Tile("accuracy", "Accuracy against dense", "none", "not measured", todo=todo)
    tile = _measured(c)
    lines = (*tile.lines, *_most_lossy(report), *(_gate(gate, n) for n, gate in enumerate(report.gates)))
    state, word = tile.state, tile.word
    if any(not gate.holds for gate in report.gates):
        state, word = "bad", "gate fails"
    elif report.gates and state != "bad":
        state, word = "good", f"gate holds, {word}"
    return Tile("accuracy", tile.title, state, word, tile.figure, lines, tile.todo)


def _most_lossy(report: Report) -> tuple[Phrase, ...]:
    """The layer that adds most to the change of the outputs, by the certificate."""
    rows = report.certificate.layers if report.certificate else ()
    if not rows:
        return ()
    n, row = max(enumerate(rows), key=lambda pair: pair[1].share)
    share = number(row.share, "{:.0%}", f".certificate.layers[{n}].share")
    return ((f"most of the change from {row.name}: ", share),)


def _measured(c: Comparison) -> Tile:
    """The tile without gates."""
    if c.metric is not None:
        return _of_metric(c)
    if c.dense and c.compressed:
        return _of_labels(c)
    count = number(c.count, "{:,.0f}", f"{KEY}.count")
    if c.values is not None:
        key = f"{KEY}.values"
        lines: tuple[Phrase, ...] = (
            ("at most ", number(c.values.relative_error_max, "{:.2%}", f"{key}.relative_error_max")),
            ("cosine similarity ", number(c.values.cosine_mean, "{:.4f}", f"{key}.cosine_mean")),
            (count, " held-out images"),
        )
        error = number(c.values.relative_error_mean, "{:.2%}", f"{key}.relative_error_mean")
        return Tile("accuracy", "Outputs against dense", "fact", "relative error", (error,), lines)
    same = number(c.agreement, "{:.2%}", f"{KEY}.agreement")
    moved = number(c.logit_shift_mean, "{:.3f}", f"{KEY}.logit_shift_mean")
    lines = ((f"{shift_name(c.head)} ", moved, " on average"), (count, " held-out images"))
    todo = "The images have no labels, so accuracy was not measured. Give labelled images to measure it."
    return Tile("accuracy", "Agreement with dense", "fact", same_answer_name(c), (same,), lines, todo)


def _of_metric(c: Comparison) -> Tile:
    """The tile of the user's own metric."""
    m, key = c.metric, f"{KEY}.metric"
    assert m is not None
    lines: list[Phrase] = []
    state: State = "fact"
    word = "no interval was measured"
    if m.interval is not None:
        lines.append(("interval ", *interval(m.interval, "{:+.4g}", f"{key}.interval", -1.0, (1, 0))))
        state, word = _judged(-m.interval[1], -m.interval[0])
    sides = number(m.compressed, "{:.4g}", f"{key}.compressed"), number(m.dense, "{:.4g}", f"{key}.dense")
    lines += [(sides[0], " compressed, ", sides[1], " dense"), (number(m.count, "{:,.0f}", f"{key}.count"), " images")]
    change = number(m.drop, "{:+.4g}", f"-1 * {key}.drop", -1.0)
    return Tile(
        "accuracy", f"{m.name} against dense", state, word, (Cell(change.text, -m.drop, change.key),), tuple(lines)
    )


def _of_labels(c: Comparison) -> Tile:
    """The tile of top-1, or of the share of right decisions."""
    assert c.dense is not None
    assert c.compressed is not None
    change = 100 * (c.compressed.top1 - c.dense.top1)
    figure = Cell(f"{change:+.2f}", change, f"100 * ({KEY}.compressed.top1 - {KEY}.dense.top1)"), " points"
    lines: list[Phrase] = []
    state: State = "fact"
    word = "change"
    if c.turned is not None:
        if c.turned.interval is not None:
            ends = interval(c.turned.interval, "{:+.2f}", f"{KEY}.turned.interval", 100.0)
            lines.append(("interval ", *ends))
        word = "no significant change"
        if c.turned.significant:
            state, word = ("good", "significant gain") if change > 0 else ("bad", "significant loss")
    sides = (
        number(side.top1, "{:.2%}", f"{KEY}.{name}.top1")
        for name, side in (("compressed", c.compressed), ("dense", c.dense))
    )
    lines.append((next(sides), " compressed, ", next(sides), " dense"))
    lines.append((number(c.count, "{:,.0f}", f"{KEY}.count"), " held-out images"))
    name = accuracy_name(c.head)
    title = f"{name[0].upper()}{name[1:]} against dense"
    return Tile("accuracy", title, state, word, figure, tuple(lines))


def _judged(low: float, high: float) -> tuple[State, str]:
    """The judgement on a change with this interval."""
    if low > 0:
        return "good", "significant gain"
    return ("bad", "significant loss") if high < 0 else ("fact", "no significant change")


def _gate(gate: Gate, n: int) -> Phrase:
    """The line of gate number `n`."""
    found = Cell("not measured") if gate.reason else number(gate.found, "{:.3g}", f".gates[{n}].found")
    limit = number(gate.limit, "{:g}", f".gates[{n}].limit")
    return "holds: " if gate.holds else "fails: ", f"{gate.name} ", found, ", limit ", limit
