"""Which budget signal keeps most, one-shot, without any training -> results/budget.{json,md,svg}.

    python benchmarks/budget.py        # EfficientNet's weights: make bench-models

Two questions, on 2,000 held-out images of Fashion-MNIST that no signal sees:

- densities: each signal shares out a density between the layers, and every layer keeps its largest weights. The rows
  differ in the allocation alone.
- patterns: each signal decides which layers get 2:4 so that a share of the model's multiply-accumulates is left, and
  the mask pass masks them by magnitude.

The ViT is the trained example. The CNN is EfficientNet-Lite0 with its ImageNet weights and a linear head
(benchmarks/lib/pretrained.py). Signals that look at images get 256, chosen by each of three seeds.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from lib.common import RESULTS, ROOT, markdown, write
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


def models() -> Iterator[tuple[str, nn.Module, Model]]:
    """The two models, as modules and captured."""
    loaded = load(Request(str(ROOT / "examples" / "fashion_vit" / "model.safetensors")))
    yield "fashion_vit", loaded.module, capture(loaded.module, loaded.source)
    module, source = on_fashion("efficientnet_lite0", CNN_SIZE)
    yield "efficientnet_lite0", module, capture(module, source)


def logits(model: Model, data: Data) -> tuple[Tensor, Tensor]:
    """Logits of all held-out images, and their labels."""
    pairs = [(model(pixels), labels) for pixels, labels in data.held_out.batches(100)]
    return torch.cat([z for z, _ in pairs]), torch.cat([labels for _, labels in pairs])


def measured(model: Model, data: Data, dense: Tensor) -> dict[str, float]:
    """Top-1, agreement with the dense model, and the mean over images of the largest change of a logit."""
    found, labels = logits(model, data)
    return {
        "top1": float((found.argmax(1) == labels).double().mean()),
        "agreement": float((found.argmax(1) == dense.argmax(1)).double().mean()),
        "logit_shift": float((found - dense).abs().amax(1).mean()),
    }


def at_densities(name: str, model: Model, dense: Tensor) -> Iterator[dict[str, Any]]:
    """A row a signal, density and seed."""
    names = [layer for layer, reason in eligible(model, NM(2, 4)).items() if reason is None]
    weights = {layer: model.layer(layer).weight.detach().clone() for layer in names}
    fits = fit_spectra(model, null=False, level=0.05, seed=0)
    for density in DENSITIES:
        for signal in SIGNALS:
            for seed in SEEDS if signal in NEED_IMAGES else SEEDS[:1]:
                data = fashion_data(model.source, seed=seed)
                shares = densities(scores_of(signal, model, names, fits, 1 - density, data), density)
                with torch.no_grad():
                    for layer, weight in weights.items():
                        removed = weight.numel() - round(shares[layer] * weight.numel())
                        edge = weight.abs().flatten().kthvalue(removed).values if removed else -1.0
                        model.layer(layer).weight.copy_(weight * (weight.abs() > edge))
                result = measured(model, data, dense)
                with torch.no_grad():
                    for layer, weight in weights.items():
                        model.layer(layer).weight.copy_(weight)
                row = {"model": name, "kind": "density", "at": density, "signal": signal, "seed": seed, **result}
                print(row, flush=True)
                yield row | {"lowest": min(shares.values()), "highest": max(shares.values())}


def at_patterns(name: str, model: Model, dense: Tensor) -> Iterator[dict[str, Any]]:
    """A row a signal, share of multiply-accumulates and seed, at 2:4."""
    for macs in MACS:
        for signal in SIGNALS:
            for seed in SEEDS if signal in NEED_IMAGES else SEEDS[:1]:
                data = fashion_data(model.source, seed=seed)
                passes: list[Pass] = [MPBudget(macs=macs, signal=signal, null=False), NMMask()]
                result, _ = PassManager(passes).run(model, data.for_passes())
                masked = sum(plan.mask is not None for plan in result.plan.values())
                row = {"model": name, "kind": "2:4", "at": macs, "signal": signal, "seed": seed, "masked": masked}
                row |= measured(result, data, dense)
                print(row, flush=True)
                yield row


def why(name: str, model: Model) -> dict[str, Any]:
    """Rank correlations over layers of what the logits amplify with what `mp` and `std` prune more by."""
    names = [layer for layer, reason in eligible(model, NM(2, 4)).items() if reason is None]
    fits = fit_spectra(model, null=False, level=0.05, seed=0)
    known = {layer: found.fit for layer in names if isinstance(found := fits[layer], SpectrumFit)}
    amplified = amplification(model, fashion_data(model.source).calibration, list(known))
    values = list(amplified.values())
    row = {"model": name, "kind": "rank correlation with amplification", "layers": len(known)}
    row["edge"] = float(spearmanr([fit.bulk_edge for fit in known.values()], values).statistic)
    row["std"] = float(spearmanr([float(model.layer(layer).weight.std()) for layer in known], values).statistic)
    print(row, flush=True)
    return row


def table(rows: list[dict[str, Any]], model: str, kind: str) -> str:
    """Top-1 and logit shift a signal, the mean over seeds and their range."""
    chosen = [row for row in rows if row["model"] == model and row["kind"] == kind]
    ats = sorted({row["at"] for row in chosen}, reverse=True)

    def cell(signal: str, at: float) -> str:
        same = [row for row in chosen if row["signal"] == signal and row["at"] == at]
        tops, shift = [100 * row["top1"] for row in same], np.mean([row["logit_shift"] for row in same])
        spread = f" [{min(tops):.1f}, {max(tops):.1f}]" if len(tops) > 1 else ""
        return f"{np.mean(tops):.2f}{spread}, {shift:.2f}"

    what = "density" if kind == "density" else "MACs left"
    columns = ("signal", *(f"{what} {at:g}" for at in ats))
    return markdown(columns, [(signal, *(cell(signal, at) for at in ats)) for signal in SIGNALS])


def plot(rows: list[dict[str, Any]], dense: dict[str, float], path: Path) -> None:
    """Top-1 against density, a panel a model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, (model, top1) in zip(figure.subplots(1, 2), dense.items(), strict=True):
        for index, signal in enumerate(SIGNALS):
            points = []
            for at in DENSITIES:
                same = [
                    r["top1"]
                    for r in rows
                    if (r["model"], r["kind"], r["at"], r["signal"]) == (model, "density", at, signal)
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
    """Writes the three files."""
    rows: list[dict[str, Any]] = []
    for name, _, model in models():
        data = fashion_data(model.source)
        dense, labels = logits(model, data)
        top1 = float((dense.argmax(1) == labels).double().mean())
        rows.append({"model": name, "kind": "dense", "top1": top1, "images": len(labels)})
        rows.append(why(name, model))
        rows.extend(at_densities(name, model, dense))
        rows.extend(at_patterns(name, model, dense))
    write("budget", __doc__.partition("\n")[0], "cpu", ("torch", "timm", "scipy"), rows)
    show(rows)


def show(rows: list[dict[str, Any]]) -> None:
    """Writes the plot and the tables."""
    dense_top1 = {row["model"]: row["top1"] for row in rows if row["kind"] == "dense"}
    reasons = [row for row in rows if "edge" in row]
    rows = [row for row in rows if "at" in row]
    plot(rows, dense_top1, RESULTS / "budget.svg")
    parts = ["# Budget signals\n\nTop-1 in per cent [lowest and highest of three seeds], then the logit shift.\n"]
    for name, top1 in dense_top1.items():
        parts.append(f"## {name}, dense {top1:.2%}\n")
        parts.extend(table(rows, name, kind) for kind in ("density", "2:4"))
    correlations = [(r["model"], str(r["layers"]), f"{r['edge']:+.2f}", f"{r['std']:+.2f}") for r in reasons]
    parts.append("## Why\n\nRank correlation over layers with how much the logits amplify a loss in them:\n")
    parts.append(markdown(("model", "layers with a fit", "of σ₊", "of the standard deviation"), correlations))
    (RESULTS / "budget.md").write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
