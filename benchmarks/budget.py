"""Accuracy by the signal that allocates the sparsity budget, without training -> results/budget.{json,md,svg}.

    python benchmarks/budget.py        # EfficientNet's weights: make bench-models

Measured on 2,000 held-out images of Fashion-MNIST that no signal sees, in two settings:

- density: each signal allocates a mean density to the layers, and every layer keeps its largest weights. The rows
  differ only in the allocation.
- 2:4: each signal selects the layers that get 2:4 until a given share of the model's MACs is left. The mask pass masks
  them with its default criterion.

The ViT is the trained example. The CNN is EfficientNet-Lite0 with its ImageNet weights and a linear head
(benchmarks/lib/pretrained.py). Signals that need images get 256 of them, with each of three seeds.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from lib.common import RESULTS, ROOT, markdown, mean_and_range, write
from lib.pretrained import fashion_data, on_fashion
from scipy.stats import spearmanr
from torch import Tensor, nn

from mpcompile.analysis.eligibility import eligible
from mpcompile.analysis.spectrum import SpectrumFit
from mpcompile.data.images import Data
from mpcompile.frontend.capture import capture
from mpcompile.frontend.load_model import Request, load
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.passes import MPBudget, NMMask
from mpcompile.passes.mp_budget.allocate import densities
from mpcompile.passes.mp_budget.mp_budget import NEED_IMAGES, Signal, fit_spectra, scores_of
from mpcompile.passes.mp_budget.sensitivity import amplification
from mpcompile.pipeline.pass_manager import Pass, PassManager
from mpcompile.report.spectrum_plots import save

DENSITIES = (0.7, 0.6, 0.5, 0.4)
MACS = (0.8, 0.7, 0.6)
SEEDS = (0, 1, 2)
SIGNALS: tuple[Signal, ...] = get_args(Signal)
CNN_SIZE = 96  # pixels; the head is fitted at this size
QUESTION = "Which signal for allocating the sparsity budget keeps the most accuracy without training?"


def models() -> Iterator[tuple[str, nn.Module, Model]]:
    """Yields the two models: name, module, and captured model."""
    loaded = load(Request(str(ROOT / "examples" / "fashion_vit" / "model.safetensors")))
    yield "fashion_vit", loaded.module, capture(loaded.module, loaded.source)
    module, source = on_fashion("efficientnet_lite0", CNN_SIZE)
    yield "efficientnet_lite0", module, capture(module, source)


def logits(model: Model, data: Data) -> tuple[Tensor, Tensor]:
    """Returns the logits (n, classes) of all held-out images, and their labels (n,)."""
    pairs = [(model(pixels), labels) for pixels, labels in data.held_out.batches(100)]
    return torch.cat([z for z, _ in pairs]), torch.cat([labels for _, labels in pairs])


def compared(model: Model, data: Data, dense: Tensor) -> dict[str, float]:
    """Returns top-1, agreement with the dense model, and the logit shift, on the held-out images.

    `dense` has the dense model's logits. The logit shift is the largest change of a logit, averaged over images.
    """
    pruned, labels = logits(model, data)
    return {
        "top1": float((pruned.argmax(1) == labels).double().mean()),
        "agreement": float((pruned.argmax(1) == dense.argmax(1)).double().mean()),
        "logit_shift": float((pruned - dense).abs().amax(1).mean()),
    }


def density_rows(name: str, model: Model, dense: Tensor) -> Iterator[dict[str, Any]]:
    """Yields one row per density, signal and seed; the weights of `model` are changed and restored."""
    names = [layer for layer, reason in eligible(model, NM(2, 4)).items() if reason is None]
    weights = {layer: model.layer(layer).weight.detach().clone() for layer in names}
    fits = fit_spectra(model, null=False, level=0.05, seed=0)
    for density in DENSITIES:
        for signal in SIGNALS:
            for seed in SEEDS if signal in NEED_IMAGES else SEEDS[:1]:
                data = fashion_data(model.source, seed=seed)
                allocated = densities(scores_of(signal, model, names, fits, 1 - density, data), density)
                with torch.no_grad():
                    for layer, weight in weights.items():
                        removed = weight.numel() - round(allocated[layer] * weight.numel())
                        threshold = weight.abs().flatten().kthvalue(removed).values if removed else -1.0
                        model.layer(layer).weight.copy_(weight * (weight.abs() > threshold))
                result = compared(model, data, dense)
                with torch.no_grad():
                    for layer, weight in weights.items():
                        model.layer(layer).weight.copy_(weight)
                row = {"model": name, "kind": "density", "at": density, "signal": signal, "seed": seed, **result}
                print(row, flush=True)
                yield row | {"lowest": min(allocated.values()), "highest": max(allocated.values())}


def pattern_rows(name: str, model: Model, dense: Tensor) -> Iterator[dict[str, Any]]:
    """Yields one row per share of MACs, signal and seed, at 2:4."""
    for macs in MACS:
        for signal in SIGNALS:
            for seed in SEEDS if signal in NEED_IMAGES else SEEDS[:1]:
                data = fashion_data(model.source, seed=seed)
                passes: list[Pass] = [MPBudget(macs=macs, signal=signal, null=False), NMMask()]
                result, _ = PassManager(passes).run(model, data.for_passes())
                masked = sum(plan.mask is not None for plan in result.plan.values())
                row = {"model": name, "kind": "2:4", "at": macs, "signal": signal, "seed": seed, "masked": masked}
                row |= compared(result, data, dense)
                print(row, flush=True)
                yield row


def correlation_row(name: str, model: Model) -> dict[str, Any]:
    """Returns the rank correlations, over layers, of the signals `mp` and `std` with the amplification.

    The amplification of a layer says how strongly removing its weights changes the logits (mp_budget/sensitivity.py).
    `edge` is the correlation of σ₊, the edge of the Marchenko–Pastur bulk; `std` that of the weights' deviation.
    """
    names = [layer for layer, reason in eligible(model, NM(2, 4)).items() if reason is None]
    fits = fit_spectra(model, null=False, level=0.05, seed=0)
    fitted = {layer: spectrum.fit for layer in names if isinstance(spectrum := fits[layer], SpectrumFit)}
    values = list(amplification(model, fashion_data(model.source).calibration, list(fitted)).values())
    row = {"model": name, "kind": "rank correlation with amplification", "layers": len(fitted)}
    row["edge"] = float(spearmanr([fit.bulk_edge for fit in fitted.values()], values).statistic)
    row["std"] = float(spearmanr([float(model.layer(layer).weight.std()) for layer in fitted], values).statistic)
    print(row, flush=True)
    return row


def table(rows: list[dict[str, Any]], model: str, kind: str) -> str:
    """Returns a table with one row per signal: mean top-1 over seeds with its range, and mean logit shift."""
    chosen = [row for row in rows if row["model"] == model and row["kind"] == kind]
    levels = sorted({row["at"] for row in chosen}, reverse=True)

    def cell(signal: str, level: float) -> str:
        same = [row for row in chosen if row["signal"] == signal and row["at"] == level]
        tops, shift = [100 * row["top1"] for row in same], np.mean([row["logit_shift"] for row in same])
        return f"{mean_and_range(tops, '{:.2f}', '{:.1f}')}, {shift:.2f}"

    heading = "density" if kind == "density" else "MACs left"
    columns = ("signal", *(f"{heading} {level:g}" for level in levels))
    return markdown(columns, [(signal, *(cell(signal, level) for level in levels)) for signal in SIGNALS])


def plot(rows: list[dict[str, Any]], dense: dict[str, float], path: Path) -> None:
    """Draws top-1 against density, one panel per model, into an SVG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, (model, top1) in zip(figure.subplots(1, 2), dense.items(), strict=True):
        for index, signal in enumerate(SIGNALS):
            points = []
            for density in DENSITIES:
                same = [
                    r["top1"]
                    for r in rows
                    if (r["model"], r["kind"], r["at"], r["signal"]) == (model, "density", density, signal)
                ]
                points.append(100 * float(np.mean(same)))
            emphasis = {"mp": ("#b5372c", 2.4, "-"), "sensitivity": ("#1f4e79", 2.4, "-")}
            color, width, style = emphasis.get(signal, (f"C{index}", 1.2, "--"))
            axes.plot(DENSITIES, points, style, marker="o", markersize=3, color=color, linewidth=width, label=signal)
        axes.axhline(100 * top1, color="#6b6b6b", linewidth=0.8)
        axes.annotate(f"dense, {top1:.2%}", (DENSITIES[-1], 100 * top1), fontsize=8, va="bottom", ha="left")
        axes.set_title(model, fontsize=10, loc="left")
        axes.set_xlabel("density of the eligible layers")
        axes.set_ylabel("top-1, 2,000 held-out images")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    save(figure, path)


def main() -> None:
    """Measures, and writes the three results files."""
    rows: list[dict[str, Any]] = []
    for name, _, model in models():
        data = fashion_data(model.source)
        dense, labels = logits(model, data)
        top1 = float((dense.argmax(1) == labels).double().mean())
        rows.append({"model": name, "kind": "dense", "top1": top1, "images": len(labels)})
        rows.append(correlation_row(name, model))
        rows.extend(density_rows(name, model, dense))
        rows.extend(pattern_rows(name, model, dense))
    write("budget", QUESTION, "cpu", ("torch", "timm", "scipy"), rows)
    report(rows)


def report(rows: list[dict[str, Any]]) -> None:
    """Writes budget.svg and budget.md."""
    dense_top1 = {row["model"]: row["top1"] for row in rows if row["kind"] == "dense"}
    correlations = [row for row in rows if "edge" in row]
    rows = [row for row in rows if "at" in row]
    plot(rows, dense_top1, RESULTS / "budget.svg")
    parts = ["# Budget signals\n\nTop-1 in per cent [lowest and highest of three seeds], then the mean logit shift.\n"]
    for name, top1 in dense_top1.items():
        parts.append(f"## {name}, dense {top1:.2%}\n")
        parts.extend(table(rows, name, kind) for kind in ("density", "2:4"))
    cells = [(r["model"], str(r["layers"]), f"{r['edge']:+.2f}", f"{r['std']:+.2f}") for r in correlations]
    parts.append("## Why\n\nRank correlation, over layers, with how strongly removing weights changes the logits:\n")
    parts.append(markdown(("model", "layers with a fit", "of σ₊", "of the standard deviation"), cells))
    (RESULTS / "budget.md").write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
