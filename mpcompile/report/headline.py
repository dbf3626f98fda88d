"""The verdict of a report in one sentence, and its warnings."""

from mpcompile.report.accuracy_tile import accuracy
from mpcompile.report.schema import Report
from mpcompile.report.speed_tile import baseline_name
from mpcompile.report.table import number
from mpcompile.report.tile import Phrase, interval


def warnings(report: Report) -> tuple[str, ...]:
    """What has to be read before any number: failed gates, and what is wrong with the dense model's accuracy."""
    check = report.comparison.dense_check if report.comparison else None
    failed = [gate for gate in report.gates if not gate.holds]
    texts = [f"The run fails a gate: {gate}." for gate in failed]
    contradictions = (*check.reasons, *check.remarks) if check else ()
    texts += [f"{text[0].upper()}{text[1:]}." for text in contradictions if not any(text in one for one in texts)]
    return tuple(texts)


def headline(report: Report) -> Phrase:
    """The verdict in one sentence: speed, accuracy and proof, as far as the run measured them."""
    parts = [part for part in (_speed(report), _accuracy(report), _proof(report)) if part]
    sentence: Phrase = ("The compressed model ", *parts[0])
    for part in parts[1:]:
        sentence = (*sentence, "; ", *part)
    return (*sentence, ".")


def _speed(report: Report) -> Phrase:
    """The speed at the first batch size, and at the last if there are several."""
    if not report.latency:
        return ("was not timed",)
    found: Phrase = ("is ",)
    for n in sorted({0, len(report.latency) - 1}):
        s, key = report.latency[n].speedup, f".latency[{n}]"
        ratio = number(s.ratio, "{:.2f} times", f"{key}.speedup.ratio")
        batch = number(report.latency[n].dense.batch, "{:.0f}", f"{key}.dense.batch")
        ends = interval(s.interval, "{:.2f}", f"{key}.speedup.interval")
        what = f" as fast as {baseline_name(report)} at batch " if n == 0 else " at batch "
        remark = "" if s.significant else ", not significant"
        found = (*found, *((" and ",) if n else ()), ratio, what, batch, " ", *ends, remark)
    return (*found, *_beside_8_bits(report))


def _beside_8_bits(report: Report) -> Phrase:
    """The speed beside the fastest dense model in 8 bits at the first batch size; empty if none was timed."""
    if report.quantized is None or not report.quantized.over_fastest:
        return ()
    s, key = report.quantized.over_fastest[0], ".quantized.over_fastest[0]"
    ratio = number(s.ratio, "{:.2f} times", f"{key}.ratio")
    batch = number(report.latency[0].dense.batch, "{:.0f}", ".latency[0].dense.batch")
    remark = "" if s.significant else ", not significant"
    ends = interval(s.interval, "{:.2f}", f"{key}.interval")
    kind = report.quantized.precision
    return ", and ", ratio, f" as fast as dense {kind} at batch ", batch, " ", *ends, remark


def _accuracy(report: Report) -> Phrase:
    """The change of accuracy with its judgement."""
    tile = accuracy(report)
    if tile.state == "none":
        return ("its accuracy was not measured",)
    return (f"{tile.title[0].lower()}{tile.title[1:]}: ", *tile.figure, f" ({tile.word})")


def _proof(report: Report) -> Phrase:
    """The share of predictions that are proven unchanged; empty without a certificate."""
    c = report.certificate
    if c is None:
        return ()
    share = number(c.proven / c.images, "{:.2%}", ".certificate.proven / .certificate.images")
    count = number(c.images, "{:,.0f}", ".certificate.images")
    return share, " of ", count, " held-out predictions are proven unchanged"
