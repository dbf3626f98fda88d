"""The whole of what a report knows of each layer as one row, for a page wide enough to show it."""

from mpcompile.report import LayerRow, Report
from mpcompile.report_tables import fit, macs_share, where
from mpcompile.tables import SPELT, Cell, Column, Table, shown
from mpcompile.verdict import LayerVerdict


def layer_table(report: Report) -> Table:
    """A row a layer; a column that would be empty in every row is left out."""
    verdicts = {row.layer: row for row in report.verdicts}
    shares = {row.name: n for n, row in enumerate(report.certificate.layers)} if report.certificate else {}
    columns = (
        Column("layer"),
        Column("MACs", True, "share of the dense model's multiply-accumulates"),
        Column("pattern"),
        Column("kept", True, "share of its weights"),
        Column("σ", True, "fitted deviation of an entry"),
        Column("edge", True, "singular value that noise passes with 5 % probability"),
        Column("spikes", True, "singular values past the edge"),
        Column("distance", True, "from the Marchenko–Pastur law, over the middle half of the spectrum"),
        Column("missed", True, "share of its dense outputs' power that it does not reproduce on calibration images"),
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
    used = [place for place in range(len(columns)) if any(row[place].text for row in rows)]
    return Table(
        tuple(columns[place] for place in used), tuple(tuple(row[place] for place in used) for row in rows), ".layers"
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
