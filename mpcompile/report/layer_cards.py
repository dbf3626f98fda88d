"""Cards: the details of each layer that the table of layers has no columns for; the page opens them at a click."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import numpy as np

from mpcompile.analysis.spectrum import BINS_TO_EDGE, HISTOGRAM_BINS, density, support
from mpcompile.report.layer_tables import fit
from mpcompile.report.schema import LayerRow, Report
from mpcompile.report.table import Cell, number

POINTS = 25  # of the curve of the law
WIDTH, HEIGHT = 340, 110  # of the picture
ENERGY_HEIGHT = 40  # of the bars of kept energy
AXIS_END = HISTOGRAM_BINS / BINS_TO_EDGE  # the axis ends at this multiple of the edge


@dataclass(frozen=True, slots=True)
class Law:
    """The singular values of a layer and the Marchenko–Pastur law that was fitted to them, as a picture.

    `bars` and `curve` are on one scale: singular values in a bin, counted and expected.
    """

    bars: str  # the outline of the histogram as an SVG path; empty in reports of earlier versions
    curve: str  # the points of an SVG polyline
    edge: int
    edge_text: Cell
    spikes: Cell


@dataclass(frozen=True, slots=True)
class Card:
    """The details of one layer: facts with their names, why the target chose its kernel, its law, its kept energy.

    `energy` is an SVG path of bars, one for each run of groups of input channels; empty without a mask.
    """

    facts: tuple[tuple[str, Cell], ...]
    reason: str
    law: Law | None
    energy: str = ""


def cards(report: Report) -> tuple[Card, ...]:
    """One card for each layer, in network order; facts without a value are left out."""
    verdicts = {row.layer: n for n, row in enumerate(report.verdicts)}
    certified = {row.name: n for n, row in enumerate(report.certificate.layers)} if report.certificate else {}
    kernels = {row.layer: n for n, row in enumerate(report.quantized.kernels)} if report.quantized else {}
    found = []
    for n, row in enumerate(report.layers):
        _, edge, spikes, bulk, _, shuffled = fit(row, n)
        verdict = verdicts.get(row.shares_weight_with or row.name)
        facts = [
            ("kind", Cell(row.kind)),
            ("shape", Cell("×".join(map(str, row.shape)))),
            *(_certified(report, certified[row.name]) if row.name in certified else ()),
            *(_timed(report, verdict) if verdict is not None else ()),
            *(_quantized(report, kernels[row.name]) if row.name in kernels else ()),
            *_kept(row, n),
            ("share of the spectrum inside the bulk", bulk),
            ("distance of its shuffled entries from the law", shuffled),
        ]
        shown = tuple(fact for fact in facts if fact[1].text)
        reason = "" if verdict is None else f"Kernel: {report.verdicts[verdict].reason}."
        found.append(Card(shown, reason, law(row, edge, spikes), energy(row)))
    return tuple(found)


def _kept(row: LayerRow, n: int) -> list[tuple[str, Cell]]:
    """The least and the largest kept energy of a run of groups."""
    if not row.kept_energy:
        return []
    ends = (min, "least"), (max, "largest")
    found = [(name, row.kept_energy.index(end(row.kept_energy))) for end, name in ends]
    return [
        (
            f"{name} kept energy of a run of groups",
            number(row.kept_energy[at], "{:.1%}", f".layers[{n}].kept_energy[{at}]"),
        )
        for name, at in found
    ]


def energy(row: LayerRow) -> str:
    """The bars of the kept energy, from 0 to 1, as an SVG path ENERGY_HEIGHT high."""
    return _outline([ENERGY_HEIGHT * share for share in row.kept_energy], ENERGY_HEIGHT)


def _outline(bars: Sequence[float], base: int) -> str:
    """Bars side by side over WIDTH, standing on the line y = `base`, as an SVG path; empty for no bars."""
    ends = ((round(base - bar), round((n + 1) * WIDTH / len(bars))) for n, bar in enumerate(bars))
    steps = (f"V{top}H{[x for _, x in same][-1]}" for top, same in groupby(ends, itemgetter(0)))
    return f"M0 {base}{''.join(steps)}V{base}z" if bars else ""


def _certified(report: Report, n: int) -> list[tuple[str, Cell]]:
    """Row `n` of the certificate."""
    assert report.certificate is not None
    reach = report.certificate.layers[n].reach
    return [
        ("largest change of its outputs, mean over images", number(reach, "{:.4g}", f".certificate.layers[{n}].reach"))
    ]


def _timed(report: Report, n: int) -> list[tuple[str, Cell]]:
    """The kernel that the target chose, and its times; verdict number `n`."""
    row, key = report.verdicts[n], f".verdicts[{n}]"
    return [
        ("kernel that runs it", Cell(row.kernel or "")),
        ("ms on the dense kernel", number(row.dense_ms, "{:.4f}", f"{key}.dense_ms")),
        ("ms on the sparse kernel", number(row.sparse_ms, "{:.4f}", f"{key}.sparse_ms")),
    ]


def _quantized(report: Report, n: int) -> list[tuple[str, Cell]]:
    """The operator that ran a layer in 8 bits, and its time; kernel number `n`."""
    assert report.quantized is not None
    row = report.quantized.kernels[n]
    return [
        ("operator that ran", Cell(row.kernel or "")),
        ("ms a call", number(row.ms, "{:.4f}", f".quantized.kernels[{n}].ms")),
    ]


def law(row: LayerRow, edge: Cell, spikes: Cell) -> Law | None:
    """The picture of a layer's spectrum and law; None without a fit."""
    s = row.spectrum
    if s is None or not s.edge:
        return None
    sides = row.shape[0], math.prod(row.shape[1:])
    shorter, longer = min(sides), max(sides)
    low, high = (math.sqrt(end * longer) for end in support(s.q, s.sigma**2))
    singular = np.linspace(low, high, POINTS)
    # The law's density of λ = s²/n becomes one of s by the factor 2 s/n, and a count by the number of values a bin.
    per_bin = shorter * s.edge / BINS_TO_EDGE
    expected = density(singular**2 / longer, s.q, s.sigma**2) * 2 * singular / longer * per_bin
    scale = 0.9 * HEIGHT / (max(float(expected.max()), *s.histogram, 0.0) or 1.0)
    across = singular * WIDTH / (AXIS_END * s.edge)
    up = HEIGHT - scale * expected
    curve = " ".join(f"{x:.0f},{y:.0f}" for x, y in zip(across.tolist(), up.tolist(), strict=True))
    return Law(_outline([scale * count for count in s.histogram], HEIGHT), curve, round(WIDTH / AXIS_END), edge, spikes)
