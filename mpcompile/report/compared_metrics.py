"""The metrics that `mpcompile compare` shows and that conditions of --fail-if name, each with its unit."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from mpcompile.measure.timing import Speedup
from mpcompile.report.compared_schema import Measured
from mpcompile.report.schema import NATIVE, Report
from mpcompile.report.tiles import COMPRESSED, DENSE

Read = Callable[[Report], Iterator[Measured]]


@dataclass(frozen=True, slots=True)
class RunMetric:
    """One metric: its name in conditions, its unit, and the function that reads it from a report.

    `needs` says how to measure it. A function yields nothing for a metric that was not measured.
    """

    name: str
    unit: str
    needs: str
    read: Read


def metrics_of(report: Report) -> dict[str, tuple[Measured, ...]]:
    """All metrics that a run has, by name."""
    found = {name: tuple(metric.read(report)) for name, metric in METRICS.items()}
    return {name: values for name, values in found.items() if values}


def _top(report: Report, number: int) -> Iterator[Measured]:
    c = report.comparison
    if c is None or c.dense is None or c.compressed is None:
        return
    sides = [side.top1 if number == 1 else side.top5 for side in (c.compressed, c.dense)]
    if sides[0] is not None and sides[1] is not None:
        yield Measured(value=100 * sides[0], dense=100 * sides[1])


def _top1_change(report: Report) -> Iterator[Measured]:
    c = report.comparison
    if c is None or c.dense is None or c.compressed is None:
        return
    ends = c.turned.interval if c.turned else None
    interval = (100 * ends[0], 100 * ends[1]) if ends else None
    yield Measured(value=100 * (c.compressed.top1 - c.dense.top1), dense=0.0, interval=interval)


def _metric(report: Report) -> Iterator[Measured]:
    m = report.comparison.metric if report.comparison else None
    if m is not None:
        yield Measured(value=m.compressed, dense=m.dense)


def _metric_change(report: Report) -> Iterator[Measured]:
    m = report.comparison.metric if report.comparison else None
    if m is not None:
        yield Measured(value=-m.drop, dense=0.0, interval=(-m.interval[1], -m.interval[0]) if m.interval else None)


def _agreement(report: Report) -> Iterator[Measured]:
    if report.comparison is not None and report.comparison.agreement is not None:
        yield Measured(value=100 * report.comparison.agreement)


def _logit_shift(report: Report) -> Iterator[Measured]:
    if report.comparison is not None:
        yield Measured(value=report.comparison.logit_shift_mean)


def _ece(report: Report) -> Iterator[Measured]:
    found = report.comparison.confidence if report.comparison else None
    if found and found.compressed.calibration and found.dense.calibration:
        yield Measured(value=found.compressed.calibration.error, dense=found.dense.calibration.error)


def _kl(report: Report) -> Iterator[Measured]:
    if report.comparison is not None and report.comparison.confidence is not None:
        yield Measured(value=report.comparison.confidence.divergence)


def _relative_error(report: Report) -> Iterator[Measured]:
    if report.comparison is not None and report.comparison.values is not None:
        yield Measured(value=100 * report.comparison.values.relative_error_mean)


def _cosine(report: Report) -> Iterator[Measured]:
    if report.comparison is not None and report.comparison.values is not None:
        yield Measured(value=report.comparison.values.cosine_mean)


def _proven(report: Report) -> Iterator[Measured]:
    if report.certificate is not None and report.certificate.images:
        yield Measured(value=100 * report.certificate.proven / report.certificate.images)


def _agreement_bound(report: Report) -> Iterator[Measured]:
    if report.certificate is not None:
        yield Measured(value=100 * report.certificate.agreement_bound)


def _speedups(report: Report, baseline: str) -> list[tuple[int, Speedup]]:
    """The batch sizes and the speedups over dense, or over the fastest dense model in 8 bits of this precision."""
    if baseline == "dense":
        return [(pair.dense.batch, pair.speedup) for pair in report.latency]
    if report.quantized is None or report.quantized.precision != baseline:
        return []
    pairs = zip(report.latency, report.quantized.over_fastest, strict=False)
    return [(pair.dense.batch, speedup) for pair, speedup in pairs]


def _speedup(baseline: str) -> Read:
    def read(report: Report) -> Iterator[Measured]:
        for batch, s in _speedups(report, baseline):
            yield Measured(value=s.ratio, dense=1.0 if baseline == "dense" else None, interval=s.interval, batch=batch)

    return read


def _speedup_low(baseline: str) -> Read:
    def read(report: Report) -> Iterator[Measured]:
        for batch, s in _speedups(report, baseline):
            yield Measured(value=s.interval[0], dense=1.0 if baseline == "dense" else None, batch=batch)

    return read


def _latency(report: Report) -> Iterator[Measured]:
    for pair in report.latency:
        found = pair.compressed
        yield Measured(value=found.p50_ms, dense=pair.dense.p50_ms, interval=found.interval_ms, batch=found.batch)


def _sizes(report: Report) -> tuple[int, int]:
    """The bytes of the file that is deployed, as in the tile of size, and of the dense file."""
    name = NATIVE if report.onnx_bytes(NATIVE) else COMPRESSED
    return report.onnx_bytes(name), report.onnx_bytes(DENSE)


def _size(report: Report) -> Iterator[Measured]:
    own, dense = _sizes(report)
    if own and dense:
        yield Measured(value=own / 1e6, dense=dense / 1e6)


def _size_ratio(report: Report) -> Iterator[Measured]:
    own, dense = _sizes(report)
    if own and dense:
        yield Measured(value=own / dense, dense=1.0)


def _macs(report: Report) -> Iterator[Measured]:
    if report.cost.dense:
        yield Measured(value=100 * report.cost.compressed / report.cost.dense, dense=100.0)


def _kept(report: Report) -> Iterator[Measured]:
    counts = report.counts()
    if counts.weights:
        yield Measured(value=100 * counts.nonzero / counts.weights, dense=100.0)


def _masked_layers(report: Report) -> Iterator[Measured]:
    yield Measured(value=float(report.counts().masked), dense=0.0)


def _sparse_layers(report: Report) -> Iterator[Measured]:
    if report.verdicts and all(row.chosen is not None for row in report.verdicts):
        yield Measured(value=float(sum(row.chosen is True for row in report.verdicts)), dense=0.0)


LABELS = "compile with --data and labelled images"
IMAGES = "compile with --data"
VALUES = "compile with --data a model whose outputs are values (--head values)"
TIMED = "compile on a machine that runs the target"
METRICS: Mapping[str, RunMetric] = MappingProxyType(
    {
        metric.name: metric
        for metric in (
            RunMetric("top1", "%", LABELS, lambda report: _top(report, 1)),
            RunMetric("top1_change", "points", LABELS, _top1_change),
            RunMetric("top5", "%", f"{LABELS} of more than 5 classes", lambda report: _top(report, 5)),
            RunMetric("metric", "", "compile with --data and --metric", _metric),
            RunMetric("metric_change", "", "compile with --data and --metric", _metric_change),
            RunMetric("agreement", "%", IMAGES, _agreement),
            RunMetric("logit_shift", "", IMAGES, _logit_shift),
            RunMetric("ece", "", LABELS, _ece),
            RunMetric("kl", "nats", IMAGES, _kl),
            RunMetric("relative_error", "%", VALUES, _relative_error),
            RunMetric("cosine", "", VALUES, _cosine),
            RunMetric("proven", "%", f"{IMAGES} and the pass certify", _proven),
            RunMetric("agreement_bound", "%", f"{IMAGES} and the pass certify", _agreement_bound),
            RunMetric("speedup", "×", TIMED, _speedup("dense")),
            RunMetric("speedup_low", "×", TIMED, _speedup_low("dense")),
            RunMetric("speedup_int8", "×", "compile with --precision int8", _speedup("int8")),
            RunMetric("speedup_int8_low", "×", "compile with --precision int8", _speedup_low("int8")),
            RunMetric("speedup_fp8", "×", "compile with --precision fp8", _speedup("fp8")),
            RunMetric("speedup_fp8_low", "×", "compile with --precision fp8", _speedup_low("fp8")),
            RunMetric("latency_ms", "ms", TIMED, _latency),
            RunMetric("size_mb", "MB", "compile again", _size),
            RunMetric("size_ratio", "×", "compile again", _size_ratio),
            RunMetric("macs", "%", "compile again", _macs),
            RunMetric("kept", "%", "compile again", _kept),
            RunMetric("masked_layers", "layers", "compile again", _masked_layers),
            RunMetric("sparse_layers", "layers", f"{TIMED}, if it reports its kernels", _sparse_layers),
        )
    }
)
