"""Tables with one row for each layer: narrow ones for Markdown, and one with all columns for the HTML page."""

from mpcompile.measure.layer_verdict import LayerVerdict
from mpcompile.report.schema import LayerRow, Report
from mpcompile.report.table import YES_NO, Cell, Column, Table, columns, number


def layers(report: Report) -> Table:
    """One row for each layer: MACs, pattern, kept share, and weight in the ONNX file or why it is dense.

    In 8 bits there are two more columns: the layer's number format and the error of its rounded weights.
    """
    rows = [
        (
            Cell(row.name),
            Cell(row.kind),
            Cell("×".join(map(str, row.shape))),
            macs_share(report, row, n),
            Cell(row.pattern or "dense"),
            number(row.density, "{:.1f} %", f".layers[{n}].density", 100),
            number(row.missed, "{:.3f} %", f".layers[{n}].missed", 100),
            *(quantization(row, n) if report.quantized else ()),
            location(row),
        )
        for n, row in enumerate(report.layers)
    ]
    names = (
        "layer",
        "kind",
        "shape",
        "MACs",
        "pattern",
        "kept",
        "refit error",
        *(("format", "rounding error") if report.quantized else ()),
        "location in the file, or why it is dense",
    )
    return Table(columns(*names, numbers=("MACs", "kept", "refit error", "rounding error")), tuple(rows), ".layers")


def quantization(row: LayerRow, n: int) -> tuple[Cell, Cell]:
    """Two cells of layer number `n` of a model in 8 bits: its number format, and the error of its rounded weights."""
    error = number(row.rounding_error, "{:.3f} %", f".layers[{n}].rounding_error", 100)
    return Cell(row.precision or "float"), error


def in_float(report: Report) -> Table:
    """One row for each layer that the target runs in floating point, with the reason.

    These are the layers that the pass `quantize` left out, and quantised layers without an 8-bit kernel.
    """
    rows = ((Cell(name), Cell(reason)) for name, reason in report.in_float().items())
    return Table(columns("layer", "why it runs in floating point"), tuple(rows), ".layers[].unquantized")


def macs_share(report: Report, row: LayerRow, n: int) -> Cell:
    """The share of the dense model's MACs that layer number `n` has."""
    share = None if row.macs is None else row.macs / report.cost.dense
    return number(share, "{:.1f} %", f".layers[{n}].macs / .cost.dense", 100)


def location(row: LayerRow) -> Cell:
    """The weight and the axis of a layer's mask in the ONNX file, or the reason why the layer is dense."""
    if row.reason:
        return Cell(row.reason)
    shared = f", shared with {row.shares_weight_with}" if row.shares_weight_with else ""
    return Cell(f"{row.initializer}, groups on axis {row.axis}{shared}", file="model.onnx")


def amplification(report: Report) -> Table:
    """One row for each layer of the certificate, largest share of the squared logit shift first."""
    found = report.certificate.layers if report.certificate else ()
    rows = []
    for n, row in sorted(enumerate(found), key=lambda item: -item[1].share):
        key = f".certificate.layers[{n}]"
        cells = [
            Cell(row.name),
            number(row.reach, "{:.4g}", f"{key}.reach"),
            number(row.reach_max, "{:.4g}", f"{key}.reach_max"),
            number(row.share, "{:.1f} %", f"{key}.share", 100),
        ]
        if report.critical():
            cells.append(number(row.critical, "{:.3g}", f"{key}.critical"))
        rows.append(tuple(cells))
    names = ("layer", "reach, mean", "largest", "share", *(["critical amplification"] if report.critical() else []))
    return Table(columns(*names, numbers=names[1:]), tuple(rows), ".certificate.layers")


def spectra(report: Report) -> Table:
    """One row for each layer that a budget pass examined: its fit, or the reason why there is none."""
    rows = [
        (Cell(row.name), *fit(row, n), Cell(row.unfitted or ""))
        for n, row in enumerate(report.layers)
        if row.spectrum or row.unfitted
    ]
    names = ("layer", "σ", "edge", "spikes", "bulk", "distance", "shuffled", "why there is no fit")
    return Table(columns(*names, numbers=names[1:7]), tuple(rows), ".layers[].spectrum")


def fit(row: LayerRow, n: int) -> tuple[Cell, ...]:
    """Six cells of layer number `n`: σ, edge, spikes, bulk share, distance, distance of shuffled entries."""
    key, s = f".layers[{n}].spectrum", row.spectrum
    if s is None:
        return (Cell(),) * 6
    return (
        number(s.sigma, "{:.4g}", f"{key}.sigma"),
        number(s.edge, "{:.4g}", f"{key}.edge"),
        number(s.spikes, "{:.0f}", f"{key}.spikes"),
        number(s.bulk_share, "{:.0f} %", f"{key}.bulk_share", 100),
        number(s.fit_error, "{:.3f}", f"{key}.fit_error"),
        number(s.null_error, "{:.3f}", f"{key}.null_error"),
    )


def unmoved(report: Report) -> Table:
    """One row for each layer whose channels were not reordered, with the reason."""
    rows = ((Cell(row.name), Cell(row.unpermuted)) for row in report.layers if row.unpermuted)
    return Table(columns("layer", "reason"), tuple(rows), ".layers[].unpermuted")


def everything(report: Report) -> Table:
    """One row for each layer, with all columns that are not empty in every row."""
    verdicts = {row.layer: row for row in report.verdicts}
    numbers = {row.layer: n for n, row in enumerate(report.verdicts)}
    shares = {row.name: n for n, row in enumerate(report.certificate.layers)} if report.certificate else {}
    headers = (
        Column("layer"),
        Column("MACs", True, "share of the dense model's multiply-accumulates"),
        Column("pattern"),
        Column("kept", True, "share of its weights"),
        Column("σ", True, "fitted standard deviation of an entry"),
        Column("edge", True, "noise exceeds this singular value with 5 % probability"),
        Column("spikes", True, "singular values above the edge"),
        Column("distance", True, "largest distance from the Marchenko–Pastur law over the middle half of the spectrum"),
        Column("refit error", True, "relative squared error of the refit on calibration images"),
        Column("format", False, "number format of weights and inputs"),
        Column("rounding error", True, "relative squared error of the rounded weights on calibration images"),
        Column("share of change", True, "estimated share of the squared change of the outputs, to first order"),
        Column("reordered", False, "whether its input channels were reordered"),
        Column("kernel", False, "whether the target runs it on a sparse kernel"),
        Column(
            "speed",
            True,
            "how many times as fast it is with the sparse kernel, alone",
        ),
        Column("location in the file, or why it is dense"),
    )
    rows = []
    for n, row in enumerate(report.layers):
        sigma, edge, spikes, _, distance, _ = fit(row, n)
        verdict, certified = verdicts.get(row.shares_weight_with or row.name), shares.get(row.name)
        share = Cell()
        if report.certificate and certified is not None:
            value = report.certificate.layers[certified].share
            share = number(value, "{:.1f} %", f".certificate.layers[{certified}].share", 100)
        rows.append(
            (
                Cell(row.name),
                macs_share(report, row, n),
                Cell(row.pattern or "dense"),
                number(row.density, "{:.1f} %", f".layers[{n}].density", 100),
                sigma,
                edge,
                spikes,
                distance,
                number(row.missed, "{:.3f} %", f".layers[{n}].missed", 100),
                *(quantization(row, n) if report.quantized else (Cell(), Cell())),
                share,
                Cell("yes" if row.permuted else "no" if row.unpermuted else ""),
                Cell(YES_NO[verdict.chosen] if verdict else ""),
                _times_as_fast(verdict, numbers[verdict.layer]) if verdict else Cell(),
                location(row),
            )
        )
    used = [i for i in range(len(headers)) if any(row[i].text for row in rows)]
    return Table(tuple(headers[i] for i in used), tuple(tuple(row[i] for i in used) for row in rows), ".layers")


def _times_as_fast(verdict: LayerVerdict, n: int) -> Cell:
    """The speed of the sparse kernel beside the dense one, of verdict number `n`; empty if both were not timed."""
    key = f".verdicts[{n}]"
    source = f"{key}.dense_ms / {key}.sparse_ms" if verdict.speedup is None else f"{key}.speedup"
    return number(verdict.times_as_fast, "{:.2f}×", source)


def remarks(report: Report) -> tuple[tuple[str, ...], ...]:
    """For each layer, the reasons for what was not done.

    These are: its channels kept their order, it stays in floating point, it has no fit, it runs on no sparse kernel.
    """
    verdicts, in_float = {row.layer: row for row in report.verdicts}, report.in_float()
    return tuple(
        _remarks(row, verdicts.get(row.shares_weight_with or row.name), in_float.get(row.name)) for row in report.layers
    )


def _remarks(row: LayerRow, verdict: LayerVerdict | None, in_float: str | None) -> tuple[str, ...]:
    texts = []
    if row.unpermuted and row.unpermuted != row.reason:
        texts.append(f"Channels not reordered: {row.unpermuted}.")
    if in_float and in_float != row.reason:
        texts.append(f"In floating point: {in_float}.")
    if row.unfitted and row.unfitted != row.reason:
        texts.append(f"No fit: {row.unfitted}.")
    if verdict and not verdict.chosen:
        texts.append(f"Kernel: {verdict.reason}.")
    return tuple(texts)
