"""The table of a model in 8 bits: dense in fp32, masks alone, the dense models in 8 bits, and the compressed model."""

from dataclasses import dataclass

from mpcompile.report.head_words import shift_name
from mpcompile.report.quantized_schema import Variant
from mpcompile.report.schema import Report
from mpcompile.report.table import Cell, Table, columns, number


@dataclass(frozen=True, slots=True)
class _Keys:
    """The jq expressions of one row. `{n}` stands for the index of the batch size."""

    top1: str
    agreement: str
    shift: str
    error: str
    cosine: str
    time: str
    speed: str


def versions(report: Report) -> Table:
    """One row for each version of the model, with its speed over the dense model in fp32.

    Columns without any value are left out.
    """
    quantized = report.quantized
    assert quantized is not None
    batches = [pair.dense.batch for pair in report.latency]
    rows = [_dense(report)]
    if quantized.before_quantize:
        rows.append(_variant(quantized.before_quantize, ".quantized.before_quantize", len(batches)))
    for n, row in enumerate(quantized.baselines):
        rows.append(_variant(row, f".quantized.baselines[{n}]", len(batches)))
    rows.append(_compressed(report))
    shift = shift_name(report.comparison.head if report.comparison else None)
    timed = [name for batch in batches for name in (f"ms, batch {batch}", "times as fast")]
    names = (
        "model", "top-1", "same answer", "relative error", "cosine similarity", shift, *timed, "why there is none",
    )  # fmt: skip
    kept = [i for i, _ in enumerate(names) if i == 0 or any(row[i].text for row in rows)]
    table = [tuple(row[i] for i in kept) for row in rows]
    return Table(columns(*(names[i] for i in kept), numbers=names[1:-1]), tuple(table), ".quantized")


def _dense(report: Report) -> tuple[Cell, ...]:
    """The row of the dense model in fp32."""
    c = report.comparison
    row = Variant(
        "dense, fp32",
        file="dense.onnx",
        top1=c.dense.top1 if c and c.dense else None,
        timings=tuple(pair.dense for pair in report.latency),
    )
    keys = _Keys(".comparison.dense.top1", "", "", "", "", ".latency[{n}].dense.p50_ms", "")
    return _cells(row, keys, len(report.latency))


def _variant(row: Variant, key: str, batches: int) -> tuple[Cell, ...]:
    """The row of a baseline or of the masks alone, which `key` reads from report.json."""
    name = f"dense {row.name}" if row.method or row.failed else f"{row.name}, fp32"
    keys = _Keys(
        f"{key}.top1",
        f"{key}.agreement",
        f"{key}.logit_shift_mean",
        f"{key}.relative_error",
        f"{key}.cosine",
        f"{key}.timings[{{n}}].p50_ms",
        f"{key}.speedups[{{n}}].ratio",
    )
    return _cells(row, keys, batches, name)


def _compressed(report: Report) -> tuple[Cell, ...]:
    """The row of the compressed model."""
    c, quantized = report.comparison, report.quantized
    assert quantized is not None
    row = Variant(
        f"compressed, {quantized.precision}",
        file="model.onnx",
        top1=c.compressed.top1 if c and c.compressed else None,
        agreement=c.agreement if c else None,
        logit_shift_mean=c.logit_shift_mean if c else None,
        relative_error=c.values.relative_error_mean if c and c.values else None,
        cosine=c.values.cosine_mean if c and c.values else None,
        timings=tuple(pair.compressed for pair in report.latency),
        speedups=tuple(pair.speedup for pair in report.latency),
    )
    keys = _Keys(
        ".comparison.compressed.top1",
        ".comparison.agreement",
        ".comparison.logit_shift_mean",
        ".comparison.values.relative_error_mean",
        ".comparison.values.cosine_mean",
        ".latency[{n}].compressed.p50_ms",
        ".latency[{n}].speedup.ratio",
    )
    return _cells(row, keys, len(report.latency))


def _cells(row: Variant, keys: _Keys, batches: int, name: str | None = None) -> tuple[Cell, ...]:
    """The cells of one row, two of them for each batch size."""
    timed: list[Cell] = []
    for n in range(batches):
        time = number(row.timings[n].p50_ms, "{:.2f}", keys.time.format(n=n)) if n < len(row.timings) else Cell()
        speed = Cell()
        if n < len(row.speedups):
            found = row.speedups[n]
            speed = Cell(found.with_interval(), found.ratio, keys.speed.format(n=n))
        timed += [time, speed]
    return (
        Cell(name or row.name, file=row.file),
        number(row.top1, "{:.2%}", keys.top1),
        number(row.agreement, "{:.2%}", keys.agreement),
        number(row.relative_error, "{:.2%}", keys.error),
        number(row.cosine, "{:.4f}", keys.cosine),
        number(row.logit_shift_mean, "{:.3f}", keys.shift),
        *timed,
        Cell(row.failed or ""),
    )
