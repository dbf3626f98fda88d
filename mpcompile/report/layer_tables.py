"""The tables of a report with a row a layer: the narrow ones, and one with all of it for a page wide enough."""

from mpcompile.measure.layer_verdict import LayerVerdict
from mpcompile.report.schema import LayerRow, Report
from mpcompile.report.table import SPELT, Cell, Column, Table, columns, shown


def layers(report: Report) -> Table:
    """A row a layer: what it costs, what was kept of it, and where the file holds it or why it is dense."""
    rows = (
        (
            Cell(row.name),
            Cell(row.kind),
            Cell("×".join(map(str, row.shape))),
            macs_share(report, row, n),
            Cell(row.pattern or "dense"),
            shown(row.density, "{:.1f} %", f".layers[{n}].density", 100),
            shown(row.missed, "{:.3f} %", f".layers[{n}].missed", 100),
            where(row),
        )
        for n, row in enumerate(report.layers)
    )
    names = ("layer", "kind", "shape", "MACs", "pattern", "kept", "missed", "in the file, or why it is dense")
    return Table(columns(*names, numbers=("MACs", "kept", "missed")), tuple(rows), ".layers")


def macs_share(report: Report, row: LayerRow, place: int) -> Cell:
    """A layer's share of the dense model's multiply-accumulates."""
    share = None if row.macs is None else row.macs / report.cost.dense
    return shown(share, "{:.1f} %", f".layers[{place}].macs / .cost.dense", 100)


def where(row: LayerRow) -> Cell:
    """Where the file holds a layer's mask, or why it has none."""
    if row.reason:
        return Cell(row.reason)
    return Cell(f"{row.initializer}, groups on axis {row.axis}", file="model.onnx")


def amplification(report: Report) -> Table:
    """A row a layer of the certificate, largest share of the shift first."""
    found = report.certificate.layers if report.certificate else ()
    rows = []
    for n, row in sorted(enumerate(found), key=lambda item: -item[1].share):
        key = f".certificate.layers[{n}]"
        cells = [
            Cell(row.name),
            shown(row.reach, "{:.4g}", f"{key}.reach"),
            shown(row.reach_max, "{:.4g}", f"{key}.reach_max"),
            shown(row.share, "{:.1f} %", f"{key}.share", 100),
        ]
        if report.critical():
            cells.append(shown(row.critical, "{:.3g}", f"{key}.critical"))
        rows.append(tuple(cells))
    names = ("layer", "reach, mean", "largest", "share", *(["critical amplification"] if report.critical() else []))
    return Table(columns(*names, numbers=names[1:]), tuple(rows), ".certificate.layers")


def spectra(report: Report) -> Table:
    """A row a layer that a budget looked at; where it has no fit, the reason."""
    rows = [
        (Cell(row.name), *fit(row, n), Cell(row.unfitted or ""))
        for n, row in enumerate(report.layers)
        if row.spectrum or row.unfitted
    ]
    names = ("layer", "σ", "edge", "spikes", "bulk", "distance", "shuffled", "why it has none")
    return Table(columns(*names, numbers=names[1:7]), tuple(rows), ".layers[].spectrum")


def fit(row: LayerRow, place: int) -> tuple[Cell, ...]:
    """σ, edge, spikes, bulk, distance from the law, and that of the shuffled entries."""
    key, s = f".layers[{place}].spectrum", row.spectrum
    if s is None:
        return (Cell(),) * 6
    return (
        shown(s.sigma, "{:.4g}", f"{key}.sigma"),
        shown(s.edge, "{:.4g}", f"{key}.edge"),
        shown(s.spikes, "{:.0f}", f"{key}.spikes"),
        shown(s.bulk_share, "{:.0f} %", f"{key}.bulk_share", 100),
        shown(s.fit_error, "{:.3f}", f"{key}.fit_error"),
        shown(s.null_error, "{:.3f}", f"{key}.null_error"),
    )


def unmoved(report: Report) -> Table:
    """A row a layer whose channels a permutation left as they were."""
    rows = ((Cell(row.name), Cell(row.unpermuted)) for row in report.layers if row.unpermuted)
    return Table(columns("layer", "why"), tuple(rows), ".layers[].unpermuted")


def everything(report: Report) -> Table:
    """A row a layer; a column that would be empty in every row is left out."""
    verdicts = {row.layer: row for row in report.verdicts}
    shares = {row.name: n for n, row in enumerate(report.certificate.layers)} if report.certificate else {}
    heads = (
        Column("layer"),
        Column("MACs", True, "share of the dense model's multiply-accumulates"),
        Column("pattern"),
        Column("kept", True, "share of its weights"),
        Column("σ", True, "fitted deviation of an entry"),
        Column("edge", True, "singular value that noise passes with 5 % probability"),
        Column("spikes", True, "singular values past the edge"),
        Column("distance", True, "from the Marchenko–Pastur law, over the middle half of the spectrum"),
        Column(
            "missed",
            True,
            "share of the power of what it was fitted to that it does not reproduce on calibration images",
        ),
        Column("shift", True, "its share of the logits' squared shift, to first order"),
        Column("reordered", False, "whether its input channels were permuted"),
        Column("kernel", False, "whether the target runs it on a sparse kernel"),
        Column("where in the file, or why not"),
    )
    rows = []
    for n, row in enumerate(report.layers):
        sigma, edge, spikes, _, distance, _ = fit(row, n)
        verdict, place = verdicts.get(row.name), shares.get(row.name)
        share = Cell()
        if report.certificate and place is not None:
            found = report.certificate.layers[place].share
            share = shown(found, "{:.1f} %", f".certificate.layers[{place}].share", 100)
        rows.append(
            (
                Cell(row.name),
                macs_share(report, row, n),
                Cell(row.pattern or "dense"),
                shown(row.density, "{:.1f} %", f".layers[{n}].density", 100),
                sigma,
                edge,
                spikes,
                distance,
                shown(row.missed, "{:.3f} %", f".layers[{n}].missed", 100),
                share,
                Cell("yes" if row.permuted else "no" if row.unpermuted else ""),
                Cell(SPELT[verdict.chosen] if verdict else ""),
                where(row),
            )
        )
    used = [place for place in range(len(heads)) if any(row[place].text for row in rows)]
    return Table(
        tuple(heads[place] for place in used), tuple(tuple(row[place] for place in used) for row in rows), ".layers"
    )


def remarks(report: Report) -> tuple[tuple[str, ...], ...]:
    """For each layer what its row has no room for: why it has no fit, kept its order, or runs on no sparse kernel."""
    verdicts = {row.layer: row for row in report.verdicts}
    return tuple(_remarks(row, verdicts.get(row.name)) for row in report.layers)


def _remarks(row: LayerRow, verdict: LayerVerdict | None) -> tuple[str, ...]:
    told = []
    if row.unpermuted and row.unpermuted != row.reason:
        told.append(f"Order kept: {row.unpermuted}.")
    if row.unfitted and row.unfitted != row.reason:
        told.append(f"No spectrum: {row.unfitted}.")
    if verdict and not verdict.chosen:
        told.append(f"Kernel: {verdict.reason}.")
    return tuple(told)
