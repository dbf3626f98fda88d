"""Cards: the details of each layer, which the page opens at a click on the layer."""

import math
from dataclasses import dataclass

import numpy as np

from mpcompile.analysis.spectrum import density, support
from mpcompile.report.chart import Chart, Label, Line, Mark, Number, Scale, ticks, x_axis
from mpcompile.report.layer_tables import fit, macs_share, quantization, remarks
from mpcompile.report.schema import LayerRow, Report
from mpcompile.report.table import Cell, number

POINTS = 33  # of the curve of the law
AXIS_END = 1.35  # the x axis ends at this multiple of the edge


@dataclass(frozen=True, slots=True)
class Card:
    """The details of one layer: facts with their names, sentences with reasons, and the picture of its spectrum."""

    name: str
    facts: tuple[tuple[str, Cell], ...]
    reasons: tuple[str, ...]
    spectrum: Chart | None


def cards(report: Report) -> tuple[Card, ...]:
    """One card for each layer, in network order."""
    notes = remarks(report)
    return tuple(_card(report, row, n, notes[n]) for n, row in enumerate(report.layers))


def _card(report: Report, row: LayerRow, n: int, notes: tuple[str, ...]) -> Card:
    """The card of layer number `n`; facts without a value are left out."""
    key, (sigma, edge, spikes, bulk, distance, _) = f".layers[{n}]", fit(row, n)
    facts = [
        ("kind", Cell(row.kind)),
        ("shape", Cell("×".join(map(str, row.shape)))),
        ("MACs, share of the dense model's", macs_share(report, row, n)),
        ("pattern", Cell(row.pattern or "dense")),
        ("weights kept", number(row.density, "{:.1f} %", f"{key}.density", 100)),
        ("refit error", number(row.missed, "{:.3f} %", f"{key}.missed", 100)),
        *_certified(report, row),
        *_quantized(report, row, n),
        *_timed(report, row),
        ("σ of the noise", sigma),
        ("noise edge", edge),
        ("singular values above the edge", spikes),
        ("share inside the bulk", bulk),
        ("distance from the law", distance),
        ("weight in model.onnx", Cell(row.initializer or "")),
    ]
    reasons = tuple(text for text in (_reason(row), *_kernel_reason(report, row), *notes) if text)
    picture = spectrum(row)
    return Card(row.name, tuple(fact for fact in facts if fact[1].text), tuple(dict.fromkeys(reasons)), picture)


def _reason(row: LayerRow) -> str:
    return f"Dense: {row.reason}." if row.reason else ""


def _certified(report: Report, row: LayerRow) -> list[tuple[str, Cell]]:
    """The layer's part in the certificate."""
    for n, found in enumerate(report.certificate.layers if report.certificate else ()):
        if found.name == row.name:
            key = f".certificate.layers[{n}]"
            return [
                ("share of the squared logit shift", number(found.share, "{:.1f} %", f"{key}.share", 100)),
                ("largest change of its outputs, mean", number(found.reach, "{:.4g}", f"{key}.reach")),
            ]
    return []


def _quantized(report: Report, row: LayerRow, n: int) -> list[tuple[str, Cell]]:
    """The layer's number format, the error of its rounded weights and its kernel, for a model in 8 bits."""
    if report.quantized is None:
        return []
    names, facts = ("number format", "rounding error"), quantization(row, n)
    found = [(name, cell) for name, cell in zip(names, facts, strict=True)]
    for i, kernel in enumerate(report.quantized.kernels):
        if kernel.layer == row.name:
            found.append(("operator that ran", Cell(kernel.kernel or "")))
            found.append(("ms a call", number(kernel.ms, "{:.4f}", f".quantized.kernels[{i}].ms")))
    return found


def _timed(report: Report, row: LayerRow) -> list[tuple[str, Cell]]:
    """The kernel that the target chose for the layer, and its times."""
    owner = row.shares_weight_with or row.name
    for n, found in enumerate(report.verdicts):
        if found.layer == owner:
            key = f".verdicts[{n}]"
            return [
                ("kernel", Cell(found.kernel or "")),
                ("ms, dense kernel", number(found.dense_ms, "{:.4f}", f"{key}.dense_ms")),
                ("ms, sparse kernel", number(found.sparse_ms, "{:.4f}", f"{key}.sparse_ms")),
            ]
    return []


def _kernel_reason(report: Report, row: LayerRow) -> list[str]:
    """Why the target chose the layer's kernel."""
    owner = row.shares_weight_with or row.name
    return [f"Kernel: {found.reason}." for found in report.verdicts if found.layer == owner]


def spectrum(row: LayerRow) -> Chart | None:
    """The Marchenko–Pastur law that was fitted to a layer, with the noise edge; None without a fit.

    The report has the fit and not the singular values, so the picture has no histogram.
    """
    s = row.spectrum
    if s is None:
        return None
    longer = max(row.shape[0], math.prod(row.shape[1:]))
    low, high = (math.sqrt(end * longer) for end in support(s.q, s.sigma**2))
    singular = np.linspace(low, high, POINTS)
    heights = density(singular**2 / longer, s.q, s.sigma**2) * 2 * singular / longer
    across = Scale(0, AXIS_END * s.edge or 1, 4, 336)
    up = Scale(0, 1.15 * float(heights.max()) or 1, 108, 8)
    marks: list[Mark] = x_axis(across, ticks(0, across.high, 5), 8, 108)
    curve: tuple[tuple[Number, Number], ...] = tuple(
        (across(float(x)), up(float(y))) for x, y in zip(singular, heights, strict=True)
    )
    marks.append(Line(curve, "curve"))
    marks.append(Line(((across(s.edge), 8), (across(s.edge), 108)), "red", f"noise edge {s.edge:.4g}"))
    marks.append(Label(across(s.edge) + 5, 20, f"{s.spikes} above", style="tick"))
    title = "Fitted law of the singular values, with the noise edge"
    description = f"{s.spikes} singular values are above the edge {s.edge:.4g}; {s.bulk_share:.0%} are inside the bulk."
    return Chart(340, 130, title, description, tuple(marks))
