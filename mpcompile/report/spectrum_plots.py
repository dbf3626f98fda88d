"""Plots of Marchenko–Pastur fits as SVG files: one for each layer, and one overview of all layers."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mpcompile.analysis.spectrum import SpectrumFit, density, support
from mpcompile.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BULK, NULL, LAW, SPIKE, EDGE = "#7fa8d1", "#6b6b6b", "#b5372c", "#1f4e79", "#2b2b2b"
AXIS_END = 1.6  # the x axis ends at this multiple of the bulk edge; the spikes beyond it are counted in a note
BINS = 60


def plot_layer(name: str, found: SpectrumFit) -> "Figure":
    """Histogram of the singular values of one layer, with the fitted law, the noise edge and the spikes."""
    from matplotlib.figure import Figure

    fit = found.fit
    scale = fit.n**0.5  # a singular value of W is √(n λ), λ an eigenvalue of W Wᵀ / n
    singular = np.sqrt(found.values) * scale
    end = AXIS_END * fit.bulk_edge
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    bins = np.linspace(0, end, BINS + 1).tolist()
    share = np.full(len(singular), 1 / (len(singular) * (bins[1] - bins[0])))
    axes.hist(singular, bins, weights=share, color=BULK, label=f"singular values ({fit.p} of them)")
    if found.null_values is not None:
        axes.hist(
            np.sqrt(found.null_values) * scale, bins, weights=share, histtype="step", color=NULL, linewidth=1.0,
            label="shuffled entries",
        )  # fmt: skip
    low, high = (limit**0.5 * scale for limit in support(fit.q, fit.sigma**2))
    x = np.linspace(low, high, 400)
    law = density((x / scale) ** 2, fit.q, fit.sigma**2) * 2 * x / fit.n  # density of √(n λ), from that of λ
    top = axes.get_ylim()[1]
    axes.plot(x, law, color=LAW, linewidth=1.8, label=f"Marchenko–Pastur, σ = {fit.sigma:.3g}")
    axes.set_ylim(0, max(top, 1.05 * float(np.median(law))))
    axes.axvline(fit.edge, color=EDGE, linestyle="--", linewidth=1.0, label=f"noise edge {fit.edge:.3g}")
    spikes = singular[singular > fit.edge]
    if len(spikes):
        _mark_spikes(axes, spikes, end)
    null = "" if found.null is None else f"; shuffled {found.null.central_error:.3f}"
    axes.set_title(
        f"{name}   {fit.p} × {fit.n}\n"
        f"{fit.spikes} above the edge with {fit.spike_mass:.0%} of ‖W‖², {fit.bulk_share:.0%} inside the bulk\n"
        f"distance from the law {fit.central_error:.3f}{null}",
        fontsize=9,
        loc="left",
    )
    axes.set_xlabel("singular value of W")
    axes.set_ylabel("density")
    axes.set_xlim(0, end)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _mark_spikes(axes: "Axes", spikes: np.ndarray, end: float) -> None:
    """Draws ticks at the spikes up to the end of the x axis, and a note that counts those beyond it."""
    shown = spikes[spikes <= end]
    axes.plot(
        shown, np.zeros(len(shown)), "|", color=SPIKE, markersize=14, clip_on=False, label=f"spikes ({len(spikes)})"
    )
    beyond = len(spikes) - len(shown)
    if beyond:
        axes.annotate(
            f"{beyond} beyond, up to {spikes.max():.3g} →",
            (0.99, 0.16),
            xycoords="axes fraction",
            ha="right",
            fontsize=8,
            color=SPIKE,
        )


def plot_overview(fits: Mapping[str, SpectrumFit]) -> "Figure":
    """One row for each layer: distance from the law, also of its shuffled entries; spike share; bulk edge σ₊."""
    from matplotlib.figure import Figure

    names = list(fits)
    rows = np.arange(len(names))
    figure = Figure(figsize=(11, max(2.5, 0.19 * len(names) + 1.2)), layout="constrained")
    error, spikes, edge = figure.subplots(1, 3, sharey=True)
    error.barh(rows, [fits[name].fit.central_error for name in names], color=BULK, label="layer")
    nulls = [(row, found.null.central_error) for row, found in zip(rows, fits.values(), strict=True) if found.null]
    if nulls:
        error.plot([value for _, value in nulls], [row for row, _ in nulls], "|", color=LAW, label="shuffled")
        error.legend(frameon=False, fontsize=8)
    error.set_xlabel("distance from the law")
    spikes.barh(rows, [fits[name].fit.spikes / fits[name].fit.p for name in names], color=SPIKE)
    spikes.set_xlabel("share of singular values above the edge")
    edge.barh(rows, [fits[name].fit.bulk_edge for name in names], color=NULL)
    edge.set_xlabel("bulk edge σ₊")
    error.set_yticks(rows, names, fontsize=7)
    error.invert_yaxis()
    error.set_ylim(len(names) - 0.4, -0.6)
    for axes in (error, spikes, edge):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="x", labelsize=8)
    return figure


def make_folder(folder: Path) -> None:
    """Creates the folder for plots. Raises UsageError if it cannot be created."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written to ({error.strerror}); name another folder with --plots"
        ) from error


def save(figure: "Figure", path: Path) -> None:
    """Writes a figure as SVG; equal figures give equal bytes."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def write_plots(fits: Mapping[str, SpectrumFit], folder: Path) -> list[Path]:
    """Writes one SVG for each layer and overview.svg; returns the paths."""
    make_folder(folder)
    figures = {re.sub(r"[^\w.-]", "_", name): plot_layer(name, found) for name, found in fits.items()}
    if fits:
        figures["overview"] = plot_overview(fits)
    paths = [folder / f"{name}.svg" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        save(figure, path)
    return paths
