"""The tile of speed: against the dense model in the run's precision, and against the dense model in int8."""

from collections.abc import Sequence

from mpcompile.ir.precision import QUANTIZED
from mpcompile.measure.timing import Speedup
from mpcompile.report.schema import Report
from mpcompile.report.search_schema import Point
from mpcompile.report.table import number
from mpcompile.report.tile import Phrase, State, Tile, interval


def speed(report: Report) -> Tile:
    """The speedup over dense for each batch size, and over the fastest dense int8 model if one was timed."""
    title = "Speed against dense"
    if not report.latency:
        why = f"{report.idle[0].upper()}{report.idle[1:]}." if report.idle else "Nothing was timed."
        todo = f"{why} Run mpcompile bench OUT on the machine that will serve the model."
        return Tile("speed", title, "none", "not measured", todo=todo)
    found = [pair.speedup for pair in report.latency]
    first = number(found[0].ratio, "{:.2f}×", ".latency[0].speedup.ratio")
    batch = number(report.latency[0].dense.batch, "{:.0f}", ".latency[0].dense.batch")
    lines: list[Phrase] = []
    for n, (pair, s) in enumerate(zip(report.latency, found, strict=True)):
        key = f".latency[{n}]"
        ratio = number(s.ratio, "{:.2f}×", f"{key}.speedup.ratio")
        ends = interval(s.interval, "{:.2f}", f"{key}.speedup.interval")
        size = number(pair.dense.batch, "{:.0f}", f"{key}.dense.batch")
        lines.append(("batch ", size, ": ", ratio, " ", *ends))
    baseline = baseline_name(report)
    state, word = _judged(found, baseline)
    extra, slower, todo = beside_8_bits(report)
    if slower and state == "good":
        state, word = "unsure", f"{word}, slower than {slower}"
    return Tile("speed", f"Speed against {baseline}", state, word, (first, " at batch ", batch), (*lines, *extra), todo)


def baseline_name(report: Report) -> str:
    """The dense model that the compressed one was timed against, with its precision."""
    return "dense in fp32" if report.recipe.precision in QUANTIZED else f"dense in {report.recipe.precision}"


def _judged(found: Sequence[Speedup], baseline: str) -> tuple[State, str]:
    """The judgement on the speedups at all batch sizes."""
    conclusions = {speedup.conclusion for speedup in found}
    if conclusions == {"faster"}:
        return "good", f"faster than {baseline}"
    if conclusions == {"slower"}:
        return "bad", f"slower than {baseline}"
    if conclusions & {"faster", "slower"}:
        return "unsure", "differs by batch size"
    return "fact", "no significant difference"


def beside_8_bits(report: Report) -> tuple[tuple[Phrase, ...], str, str]:
    """Lines on the dense model in 8 bits, its name if it is significantly faster, and how to time it if it was not."""
    lines: list[Phrase] = []
    slower = ""
    if report.quantized and report.quantized.over_fastest:
        kind = report.quantized.precision
        for n, (pair, s) in enumerate(zip(report.latency, report.quantized.over_fastest, strict=False)):
            key = f".quantized.over_fastest[{n}]"
            size = number(pair.dense.batch, "{:.0f}", f".latency[{n}].dense.batch")
            ratio = number(s.ratio, "{:.2f}×", f"{key}.ratio")
            ends = interval(s.interval, "{:.2f}", f"{key}.interval")
            lines.append((f"against dense {kind}, batch ", size, ": ", ratio, " ", *ends))
            if s.conclusion == "slower":
                slower = f"dense {kind}"
        return tuple(lines), slower, ""
    for n, point in enumerate(report.tuning.references if report.tuning else ()):
        if point.speedups:
            lines += _reference(point, n, report)
            pairs = zip(point.speedups, report.latency, strict=False)
            if any(theirs.interval[0] > pair.speedup.interval[1] for theirs, pair in pairs):
                slower = f"dense {point.name}"
    if lines:
        return tuple(lines), slower, ""
    kind = report.recipe.precision if report.quantized else "int8"
    where = "to time it, run the command with --precision int8 and another folder for -o"
    if report.quantized:
        where = "the table of models in 8 bits has the reason"
    return (), "", f"Against dense {kind}: not measured; {where}."


def _reference(point: Point, n: int, report: Report) -> list[Phrase]:
    """For each batch size the speedup of a dense model in 8 bits over the dense model, which the search measured."""
    lines: list[Phrase] = []
    batches = report.tuning.batches if report.tuning else ()
    for i, (_, s) in enumerate(zip(batches, point.speedups, strict=False)):
        key = f".tuning.references[{n}].speedups[{i}]"
        size = number(batches[i], "{:.0f}", f".tuning.batches[{i}]")
        ratio = number(s.ratio, "{:.2f}×", f"{key}.ratio")
        ends = interval(s.interval, "{:.2f}", f"{key}.interval")
        lines.append((f"dense {point.name}, batch ", size, ": ", ratio, " ", *ends))
    return lines
