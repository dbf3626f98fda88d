"""Tables of a report, except those with one row for each layer (layer_tables.py)."""

from collections.abc import Iterable

from mpcompile.measure.value_errors import ValueErrors
from mpcompile.report.confidence_tables import confidence_rows
from mpcompile.report.head_words import accuracy_name, same_answer_name, shift_name
from mpcompile.report.layer_counts import count_layers
from mpcompile.report.schema import NATIVE, Report
from mpcompile.report.table import Cell, Column, Table, columns, number


def summary(report: Report) -> Table:
    """The main results: one row for each measure, with its dense and compressed values and their difference."""
    rows: list[tuple[Cell, ...]] = []
    c = report.comparison
    if c and c.dense and c.compressed:
        sides = (
            number(a.top1, "{:.2%}", f".comparison.{n}.top1")
            for n, a in (("dense", c.dense), ("compressed", c.compressed))
        )
        gained = "100 * (.comparison.compressed.top1 - .comparison.dense.top1)"
        drop = number(100 * (c.compressed.top1 - c.dense.top1), "{:+.2f} points", gained)
        rows.append((Cell(f"{accuracy_name(c.head)}, {c.count:,} held-out images"), *sides, drop))
    if c and c.metric:
        m, key = c.metric, ".comparison.metric"
        drop = number(-m.drop, "{:+.4g}", f"-{key}.drop")
        if m.interval:
            text = f"{-m.drop:+.4g} [{-m.interval[1]:+.4g}, {-m.interval[0]:+.4g}]"
            drop = Cell(text, -m.drop, f"-{key}.drop")
        means = number(m.dense, "{:.4g}", f"{key}.dense"), number(m.compressed, "{:.4g}", f"{key}.compressed")
        rows.append((Cell(f"{m.name}, {m.count:,} held-out images"), *means, drop))
    if c and c.values:
        rows += _of_values(c.values, c.count)
    elif c:
        same = number(c.agreement, "{:.2%}", ".comparison.agreement")
        rows.append((Cell(f"{same_answer_name(c)}, {c.count:,} images"), Cell(), same, Cell()))
    if c:
        rows.append(
            (
                Cell(f"{shift_name(c.head)}, mean (largest); dense: range of the outputs"),
                number(c.logit_range, "range {:.2f}", ".comparison.logit_range"),
                number(c.logit_shift_mean, "{:.3f}", ".comparison.logit_shift_mean"),
                number(c.logit_shift_max, "({:.3f})", ".comparison.logit_shift_max"),
            )
        )
    rows += confidence_rows(report)
    if report.certificate:
        p = report.certificate
        share = number(p.proven / p.images, "{:.2%}", ".certificate.proven / .certificate.images")
        rows.append((Cell(f"proven unchanged, {p.images:,} held-out images"), Cell(), share, Cell()))
        bound = number(p.agreement_bound, "at least {:.2%}", ".certificate.agreement_bound")
        rows.append((Cell(f"same answer on unseen images, at {p.confidence:.0%}"), Cell(), bound, Cell()))
    rows.append((Cell("ONNX file"), *_compared(*(_onnx(report, name) for name in ("dense.onnx", "model.onnx")))))
    if report.onnx_bytes(NATIVE):
        native = _compared(_onnx(report, "dense.onnx"), _onnx(report, NATIVE))
        rows.append((Cell("ONNX file with N:M kernels, the one timed"), *native))
    # No jq key: the expression that sums these over the layers would be too long to read.
    weights, nonzero = report.weights(), report.nonzero()
    counts = (Cell(f"{count / 1e6:.2f} M", float(count)) for count in (weights, nonzero))
    rows.append((Cell("non-zero weights"), *counts, Cell(f"{nonzero / weights:.2f}×", nonzero / weights)))
    k = report.cost
    rows.append((Cell("multiply-accumulates left, zeros skipped"), *_macs(k.dense, k.compressed, ".cost.compressed")))
    if report.merges_tokens():
        cells = _macs(k.dense, k.as_published, ".cost.as_published")
        rows.append((Cell("multiply-accumulates, counted as in the paper"), *cells))
    for n, pair in enumerate(report.latency):
        key, (low, high) = f".latency[{n}]", pair.speedup.interval
        rows.append(
            (
                Cell(f"median latency, batch {pair.dense.batch}, {pair.speedup.count} rounds"),
                number(pair.dense.p50_ms, "{:.2f} ms", f"{key}.dense.p50_ms"),
                number(pair.compressed.p50_ms, "{:.2f} ms", f"{key}.compressed.p50_ms"),
                number(pair.speedup.ratio, f"{{:.2f}}× as fast [{low:.2f}, {high:.2f}]", f"{key}.speedup.ratio"),
            )
        )
    rows += beside_dense_8_bits(report)
    names = ("", "dense, fp32" if report.quantized else "dense", "compressed", "difference")
    return Table(columns(*names, numbers=names[1:]), tuple(rows), ".")


def _of_values(values: ValueErrors, count: int) -> list[tuple[Cell, ...]]:
    """The rows of outputs that are values."""
    key, images = ".comparison.values", f"{count:,} held-out images"
    return [
        (
            Cell(f"relative error, mean (largest), {images}"),
            Cell(),
            number(values.relative_error_mean, "{:.2%}", f"{key}.relative_error_mean"),
            number(values.relative_error_max, "({:.2%})", f"{key}.relative_error_max"),
        ),
        (
            Cell(f"cosine similarity, mean (smallest), {images}"),
            Cell(),
            number(values.cosine_mean, "{:.4f}", f"{key}.cosine_mean"),
            number(values.cosine_min, "({:.4f})", f"{key}.cosine_min"),
        ),
    ]


def beside_dense_8_bits(report: Report) -> list[tuple[Cell, ...]]:
    """One row for each batch size: a model in 8 bits beside the fastest dense one in 8 bits; none for other models."""
    rows: list[tuple[Cell, ...]] = []
    found = report.quantized
    if found is None:
        return rows
    for n, (pair, speed) in enumerate(zip(report.latency, found.over_fastest, strict=False)):
        index, row = next((i, row) for i, row in enumerate(found.baselines) if row.name == speed.baseline)
        (low, high), key = speed.interval, f".quantized.over_fastest[{n}].ratio"
        rows.append(
            (
                Cell(f"beside dense {speed.baseline}, batch {pair.dense.batch}"),
                number(row.timings[n].p50_ms, "{:.2f} ms", f".quantized.baselines[{index}].timings[{n}].p50_ms"),
                number(pair.compressed.p50_ms, "{:.2f} ms", f".latency[{n}].compressed.p50_ms"),
                number(speed.ratio, f"{{:.2f}}× as fast [{low:.2f}, {high:.2f}]", key),
            )
        )
    return rows


def _onnx(report: Report, name: str) -> Cell:
    """The size of an ONNX file with its external weights."""
    keys = [f".files[{n}].bytes" for n, row in enumerate(report.files) if row.name in (name, f"{name}.data")]
    return Cell(f"{report.onnx_bytes(name) / 1e6:.2f} MB", float(report.onnx_bytes(name)), " + ".join(keys), name)


def _compared(dense: Cell, compressed: Cell) -> tuple[Cell, Cell, Cell]:
    """Both cells, and the ratio compressed / dense."""
    assert dense.value is not None
    assert compressed.value is not None
    ratio = number(compressed.value / dense.value, "{:.2f}×", f"({compressed.key}) / ({dense.key})")
    return dense, compressed, ratio


def _macs(dense: float, left: float, key: str) -> tuple[Cell, Cell, Cell]:
    """MACs of the dense and of the compressed model in G, and their relative change."""
    change = number(left / dense - 1, "{:+.2%}", f"{key} / .cost.dense - 1")
    return number(dense, "{:.4g} G", ".cost.dense", 1e-9), number(left, "{:.4g} G", key, 1e-9), change


def gates(report: Report) -> Table:
    """One row for each limit of the recipe."""
    rows = (
        (
            Cell(gate.name),
            number(gate.limit, "{}", f".gates[{n}].limit"),
            number(gate.found, "{:.3f}", f".gates[{n}].found"),
            Cell("yes" if gate.holds else "no"),
        )
        for n, gate in enumerate(report.gates)
    )
    return Table(columns("gate", "limit", "found", "holds", numbers=("limit", "found")), tuple(rows), ".gates")


def tuning(report: Report) -> Table:
    """One row for each recipe that the search tried, then one for each int8 reference."""
    found = report.tuning
    batches = found.batches if found else ()
    keyed = []
    if found:
        keyed += [(str(n + 1), f".tuning.points[{n}]", point) for n, point in enumerate(found.points)]
        keyed += [("", f".tuning.references[{n}]", point) for n, point in enumerate(found.references)]
    form = "{:.2f}" if found is None or found.metric is None else "{:.4g}"
    failed = any(point.failed for _, _, point in keyed)
    rows = []
    for row, key, point in keyed:
        speeds = []
        for n in range(len(batches)):
            cell = Cell()
            if n < len(point.speedups):
                s = point.speedups[n]
                ratio = f"{{:.2f}} [{s.interval[0]:.2f}, {s.interval[1]:.2f}]"
                cell = number(s.ratio, ratio, f"{key}.speedups[{n}].ratio")
            speeds.append(cell)
        rows.append(
            (
                Cell(row),
                Cell(point.name),
                number(point.macs, "{:.1f} %", f"{key}.macs", 100),
                number(point.drop, form, f"{key}.drop"),
                number(point.error, form, f"{key}.error"),
                Cell("" if point.failed else "yes" if point.holds else "no"),
                *speeds,
                *([Cell(point.failed or "")] if failed else []),
            )
        )
    drop = "drop in points" if found is None or found.metric is None else f"drop of {found.metric}"
    speeds_at = tuple(f"speed, batch {batch}" for batch in batches)
    why = ("reason of the failure",) if failed else ()
    names = ("row", "recipe", "MACs left", drop, "standard error", "holds", *speeds_at, *why)
    numbers = ("row", *names[2:5], *speeds_at)
    return Table(columns(*names, numbers=numbers), tuple(rows), ".tuning")


def checks(report: Report) -> Table:
    """One row for each comparison of two forms of one model, which have to agree within a tolerance."""
    rows = (
        (
            Cell(row.what),
            number(row.difference, "{:.1e}", f".parity[{n}].difference"),
            number(row.tolerance, "{:.0e}", f".parity[{n}].tolerance"),
            number(row.images, "{:.0f}", f".parity[{n}].images"),
        )
        for n, row in enumerate(report.parity)
    )
    names = ("compared", "difference", "allowed", "images")
    return Table(columns(*names, numbers=names[1:]), tuple(rows), ".parity")


def passes(report: Report) -> Table:
    """One row for each pass, in execution order."""
    rows = (
        (
            Cell(row.name),
            Cell(str(row.effect)),
            number(row.seconds, "{:.2f}", f".passes[{n}].seconds"),
            number(row.peak_bytes, "{:.0f} MB", f".passes[{n}].peak_bytes", 1e-6),
            number(row.drift, "{:.1e}", f".passes[{n}].drift"),
            Cell(("; ".join(row.notes) or "none") + ("; taken from a checkpoint" if row.resumed else "")),
        )
        for n, row in enumerate(report.passes)
    )
    names = ("pass", "effect", "seconds", "peak memory", "drift on the example", "notes")
    return Table(columns(*names, numbers=names[2:5]), tuple(rows), ".passes")


def epochs(report: Report) -> Table:
    """One row for each epoch of training."""
    rows = (
        (
            Cell(str(n + 1), float(n + 1)),
            number(row.steps, "{:.0f}", f".epochs[{n}].steps"),
            number(row.loss, "{:.4f}", f".epochs[{n}].loss"),
            number(row.labels_loss, "{:.4f}", f".epochs[{n}].labels_loss"),
            number(row.teacher_loss, "{:.4f}", f".epochs[{n}].teacher_loss"),
            number(row.rate, "{:.1e}", f".epochs[{n}].rate"),
            number(row.edge, "{:.4f}", f".epochs[{n}].edge"),
            number(row.spikes, "{:.0f}", f".epochs[{n}].spikes"),
        )
        for n, row in enumerate(report.epochs)
    )
    names = ("epoch", "steps", "loss", "label loss", "teacher loss", "last learning rate", "σ₊", "spikes")
    return Table(columns(*names, numbers=names), tuple(rows), ".epochs")


def latency(report: Report) -> Table:
    """Two rows for each batch size: dense and compressed."""
    rows = []
    for n, pair in enumerate(report.latency):
        for name, t in (("dense", pair.dense), ("compressed", pair.compressed)):
            key, (low, high) = f".latency[{n}].{name}", t.interval_ms
            rows.append(
                (
                    Cell(name),
                    number(t.batch, "{:.0f}", f"{key}.batch"),
                    number(t.p50_ms, "{:.3f}", f"{key}.p50_ms"),
                    Cell(f"{low:.3f} to {high:.3f}", low, f"{key}.interval_ms[0]"),
                    number(t.p90_ms, "{:.3f}", f"{key}.p90_ms"),
                    number(t.p99_ms, "{:.3f}", f"{key}.p99_ms"),
                    number(t.count, "{:.0f}", f"{key}.count"),
                    Cell(t.device),
                )
            )
    names = ("", "batch", "median", "interval", "p90", "p99", "calls", "device")
    return Table(columns(*names, numbers=names[1:7]), tuple(rows), ".latency")


def budget(report: Report) -> Table:
    """One row for each pattern: the number of its layers, their MACs, and their remaining MACs, as shares of dense."""
    rows = []
    for pattern in dict.fromkeys(row.pattern for row in report.layers):
        chosen = [row for row in report.layers if row.pattern == pattern]
        count = count_layers(chosen).layers
        before, after = (_total(getattr(row, key) for row in chosen) for key in ("macs", "macs_left"))
        rows.append(
            (
                Cell(pattern or "dense"),
                Cell(str(count), float(count)),
                Cell(f"{100 * before / report.cost.dense:.1f} %", before / report.cost.dense),
                Cell(f"{100 * after / report.cost.dense:.1f} %", after / report.cost.dense),
            )
        )
    names = ("pattern", "layers", "MACs (share of dense)", "MACs left (share of dense)")
    return Table(columns(*names, numbers=names[1:]), tuple(rows), ".layers")


def _total(counts: Iterable[float | None]) -> float:
    """The sum of the counts that are not None."""
    return sum((count for count in counts if count is not None), 0.0)


def outputs(report: Report) -> Table:
    """One row for each output of the model, the primary one first."""
    rows = () if report.captured is None else report.captured.outputs
    cells = (
        (
            Cell(row.name),
            Cell("×".join(map(str, row.shape)) or "1"),
            number(row.relative_error, "{:.2%}", f".captured.outputs[{n}].relative_error"),
            number(row.cosine, "{:.4f}", f".captured.outputs[{n}].cosine"),
        )
        for n, row in enumerate(rows)
    )
    names = "output", "shape of one image's", "largest relative error", "smallest cosine"
    return Table(columns(*names, numbers=names[2:]), tuple(cells), ".captured.outputs")


def environment(report: Report) -> Table:
    """One row for each property of the machine and each library version."""
    rows = ((Cell(key), Cell(value)) for key, value in report.environment.items())
    return Table((Column(""), Column("")), tuple(rows), ".environment")


def files(report: Report) -> Table:
    """One row for each file of the output folder."""
    rows = (
        (Cell(row.name, file=row.name), number(row.bytes, "{:.0f}", f".files[{n}].bytes"), Cell(row.sha256))
        for n, row in enumerate(report.files)
    )
    return Table(columns("file", "bytes", "SHA-256", numbers=("bytes",)), tuple(rows), ".files")
