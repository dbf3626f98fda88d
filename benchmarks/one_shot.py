"""Accuracy of mask criteria and refits without training -> results/one_shot.{json,md}.

    python benchmarks/one_shot.py        # EfficientNet's weights: make bench-models
                                         # ModelOpt's rows: pip install nvidia-modelopt==0.47.0
    python benchmarks/one_shot.py --again ours --models efficientnet_lite0     # only these rows; others are kept

Two models at 2:4, 8:16 and 1:4, with a mask on every eligible layer, are evaluated on 2,000 held-out images of
Fashion-MNIST. The ViT is the trained example, the CNN EfficientNet-Lite0 with a linear head
(benchmarks/lib/pretrained.py). Settings are the same for both models and all patterns. Methods that need images get 256
of them, chosen by each of three seeds. Magnitude needs none, so its rows differ between seeds only in batch-norm
statistics.

Methods without refit are also measured with two corrections of batch-norm statistics:

- "re-estimated" from the calibration images, as is usual. It is measured at 2:4 only: these images differ from the
  training set of the CNN, and accuracy is low;
- "moved", that is corrected for the shift that pruning caused (passes/batch_norm.py).

Ours are the passes of `mpcompile MODEL --pattern N:M --data …` without the factor of confidence, which changes no
answer.
"""

import argparse
import copy
import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from budget import compared, logits, models
from lib.common import RESULTS, markdown, mean_and_range, rows_of, write
from lib.pretrained import fashion_data
from lib.sparsegpt import modelopt_sparsegpt, sparsegpt
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mpcompile.analysis.eligibility import eligible
from mpcompile.data.images import Data, Split
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.passes import BatchNorm, NMMask, Permute
from mpcompile.passes.batch_norm import match_statistics
from mpcompile.passes.nm_mask.nm_mask import CriterionName
from mpcompile.pipeline.pass_manager import Pass, PassManager

PATTERNS = (NM(2, 4), NM(8, 16), NM(1, 4))
SEEDS = (0, 1, 2)
OURS = "joint, permutation, refit, repair, residual (ours)"
QUESTION = "How much accuracy do mask criteria and refits keep without training?"
# These methods are not measured with the corrections: the refit restores the means, and ours has the pass batch-norm.
REFITTED = ("covariance, permutation, refit", "joint, permutation, refit", OURS)


def passes_of(*steps: Pass) -> Callable[[Model, Data], Model]:
    """Returns a function that applies these passes to a model."""
    return lambda model, data: PassManager(steps).run(model, data.for_passes())[0]


def masked_layers_only(pattern: NM, criterion: CriterionName) -> NMMask:
    """Returns a mask pass that refits only the masked layers, each to the outputs of the dense layer."""
    return NMMask(pattern, criterion, "model", repair=False, residual=False)


def methods(module: nn.Module, pattern: NM, names: list[str]) -> dict[str, Callable[[Model, Data], Model]]:
    """Returns the methods by name; each is a function that returns the pruned model of a dense one."""
    by_magnitude = Permute(score="magnitude")
    pruners: dict[str, Callable[[Model, Data], Model]] = {
        "magnitude": passes_of(NMMask(pattern, "magnitude", "none")),
        "Wanda": passes_of(NMMask(pattern, "wanda", "none")),
        "SparseGPT, ModelOpt": lambda m, d: modelopt_sparsegpt(m, module, d.calibration, pattern, names),
        "SparseGPT, from its paper": lambda m, d: sparsegpt(m, d.calibration, pattern, names),
        "covariance": passes_of(NMMask(pattern, "covariance", "none")),
        "covariance, permutation, refit": passes_of(by_magnitude, masked_layers_only(pattern, "covariance")),
        "joint, permutation, refit": passes_of(by_magnitude, masked_layers_only(pattern, "joint")),
        OURS: passes_of(Permute(pattern), NMMask(pattern), BatchNorm()),
    }
    if importlib.util.find_spec("modelopt") is None:
        print(
            "ModelOpt is not installed, so its rows are skipped: pip install nvidia-modelopt==0.47.0", file=sys.stderr
        )
    if importlib.util.find_spec("modelopt") is None or pattern != NM(2, 4):  # ModelOpt supports only 2:4
        pruners.pop("SparseGPT, ModelOpt")
    return pruners


def reestimated(model: Model, images: Split) -> Model:
    """Returns the model with batch-norm statistics re-estimated from the images."""
    graph = copy.deepcopy(model.graph)
    norms = [m for m in graph.modules() if isinstance(m, _BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for pixels, _ in images.batches(64):
            graph(pixels)
    return replace(model, graph=graph.eval())


def corrected(model: Model, dense: Model, images: Split) -> Model:
    """Returns the model with batch-norm statistics corrected for the shift that pruning caused."""
    graph = copy.deepcopy(model.graph)
    with torch.no_grad():
        match_statistics(dense.graph, graph, images)
    return replace(model, graph=graph)


def main() -> None:
    """Measures, and writes both results files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", nargs="*", help="measure only methods whose names contain one of these words")
    parser.add_argument("--models", nargs="*", help="measure only these models")
    arguments = parser.parse_args()

    def selected(model: str, method: str) -> bool:
        parts = arguments.again
        return (parts is None or any(part in method for part in parts)) and model in (arguments.models or [model])

    earlier = rows_of("one_shot") if arguments.again or arguments.models else []
    rows = [row for row in earlier if not selected(row["model"], row["method"].partition(" + ")[0])]

    def add(row: dict[str, Any]) -> None:
        print(row, flush=True)
        rows.append(row)

    for name, module, model in models():
        has_batch_norm = any(isinstance(m, _BatchNorm) for m in model.graph.modules())
        dense, labels = logits(model, fashion_data(model.source))
        top1 = float((dense.argmax(1) == labels).double().mean())
        if selected(name, "dense"):
            add({"model": name, "method": "dense", "top1": top1, "images": len(labels)})
        for pattern in PATTERNS:
            names = [layer for layer, reason in eligible(model, pattern).items() if reason is None]
            for method, prune in methods(module, pattern, names).items():
                if not selected(name, method):
                    continue
                needs_no_images = method == "magnitude"
                for seed in SEEDS if has_batch_norm or not needs_no_images else SEEDS[:1]:
                    data = fashion_data(model.source, seed=seed)
                    start = time.perf_counter()
                    result = prune(model, data)
                    seconds = time.perf_counter() - start
                    row = {"model": name, "pattern": str(pattern), "seed": seed, "layers": len(names)}
                    if not needs_no_images or seed == SEEDS[0]:
                        add(row | {"method": method, "seconds": seconds} | compared(result, data, dense))
                    if not has_batch_norm or method in REFITTED:
                        continue
                    corrections = {"moved": corrected(result, model, data.calibration)}
                    if pattern == PATTERNS[0]:
                        corrections["re-estimated"] = reestimated(result, data.calibration)
                    for correction, other in corrections.items():
                        keys = {"method": f"{method} + statistics {correction}", "seconds": seconds}
                        add(row | keys | compared(other, data, dense))
        write("one_shot", QUESTION, "cpu", ("torch", "timm"), rows)
    (RESULTS / "one_shot.md").write_text(page(rows), encoding="utf-8")


def cell(rows: list[dict[str, Any]]) -> tuple[str, str]:
    """Returns two cells: mean top-1 over seeds with its range, and the mean logit shift with its range."""
    if not rows:
        return "–", "–"
    tops, shifts = [100 * row["top1"] for row in rows], [row["logit_shift"] for row in rows]
    return mean_and_range(tops, "{:.2f}", "{:.1f}"), mean_and_range(shifts)


def page(rows: list[dict[str, Any]]) -> str:
    """Returns the Markdown page with a table per model: top-1 and logit shift at each pattern, and seconds at 2:4."""
    parts = [
        "# One-shot masks and refits\n",
        "Top-1 in per cent on 2,000 held-out images, and the logit shift: the largest change of a logit, averaged over "
        "images; [lowest, highest of three seeds]. s: seconds to prune at 2:4, with calibration, on one or two cores "
        "shared with other load.\n",
    ]
    for dense in [row for row in rows if row["method"] == "dense"]:
        own = [row for row in rows if row["model"] == dense["model"] and row["method"] != "dense"]
        parts.append(f"## {dense['model']}, dense {dense['top1']:.2%}\n")
        table = []
        for method in dict.fromkeys(row["method"] for row in own):
            line = [method]
            for pattern in map(str, PATTERNS):
                line.extend(cell([r for r in own if (r["method"], r["pattern"]) == (method, pattern)]))
            seconds = [r["seconds"] for r in own if (r["method"], r["pattern"]) == (method, "2:4")]
            table.append((*line, f"{np.median(seconds):.1f}"))
        heads = [head for pattern in PATTERNS for head in (f"{pattern}, top-1", "shift")]
        parts.append(markdown(("method", *heads, "s"), table))
    return "\n".join(parts)


if __name__ == "__main__":
    main()
