"""What masks and refits keep without any training -> results/one_shot.{json,md}.

    python benchmarks/one_shot.py        # EfficientNet's weights: make bench-models
                                         # ModelOpt's rows: pip install nvidia-modelopt==0.47.0
    python benchmarks/one_shot.py --again ours --models efficientnet_lite0     # these rows anew, the others stay

Two models at 2:4, 8:16 and 1:4, every eligible layer masked, evaluated on 2,000 held-out images of Fashion-MNIST. The
ViT is the trained example, the CNN EfficientNet-Lite0 with a linear head (benchmarks/lib/pretrained.py). Methods that
look at images get 256, chosen by each of three seeds; magnitude looks at none, and its rows differ by seed only in
batch statistics. Two ways with batch statistics stand beside the methods that leave them alone: re-estimated from the
calibration images, as is usual (at 2:4 alone: these images are not like those that the CNN was trained on, and it does
badly), and moved by as much as pruning moved them (passes/batch_norm.py). The same settings are used for both models
and all patterns. The damping of the refit was set between three trials on calibration images that were not calibrated
on there; those that other seeds calibrate on here are among them, held-out ones are not.
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
from budget import logits, measured, models
from lib.common import RESULTS, markdown, rows_of, write
from lib.pretrained import fashion_data
from lib.sparsegpt import modelopt_sparsegpt, sparsegpt
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mpcompile.analysis.eligibility import eligible
from mpcompile.data.images import Data, Split
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.passes import NMMask, Permute
from mpcompile.passes.batch_norm import match_statistics
from mpcompile.passes.nm_mask.nm_mask import CriterionName
from mpcompile.pipeline.pass_manager import Pass, PassManager

PATTERNS = (NM(2, 4), NM(8, 16), NM(1, 4))
SEEDS = (0, 1, 2)
OURS = "joint, permutation, refit, repair, residual (ours)"
# The refit has set the means that statistics would be moved for.
REFITTED = ("covariance, permutation, refit", "joint, permutation, refit", OURS)


def passes_of(*steps: Pass) -> Callable[[Model, Data], Model]:
    """These passes as one function."""
    return lambda model, data: PassManager(steps).run(model, data.for_passes())[0]


def alone(pattern: NM, criterion: CriterionName) -> NMMask:
    """Masks and fits the masked layers alone, each to what the dense layer gives."""
    return NMMask(pattern, criterion, "model", repair=False, residual=False)


def methods(module: nn.Module, pattern: NM, names: list[str]) -> dict[str, Callable[[Model, Data], Model]]:
    """What is compared: each makes a pruned model of a dense one."""
    found: dict[str, Callable[[Model, Data], Model]] = {
        "magnitude": passes_of(NMMask(pattern, "magnitude", "none")),
        "Wanda": passes_of(NMMask(pattern, "wanda", "none")),
        "SparseGPT, ModelOpt": lambda m, d: modelopt_sparsegpt(m, module, d.calibration, pattern, names),
        "SparseGPT, from its paper": lambda m, d: sparsegpt(m, d.calibration, pattern, names),
        "covariance": passes_of(NMMask(pattern, "covariance", "none")),
        "covariance, permutation, refit": passes_of(Permute(score="magnitude"), alone(pattern, "covariance")),
        "joint, permutation, refit": passes_of(Permute(score="magnitude"), alone(pattern, "joint")),
        OURS: passes_of(Permute(), NMMask(pattern)),
    }
    if importlib.util.find_spec("modelopt") is None:
        print("ModelOpt is not installed: its rows are left out", file=sys.stderr)
    if importlib.util.find_spec("modelopt") is None or pattern != NM(2, 4):  # the only pattern that it knows
        found.pop("SparseGPT, ModelOpt")
    return found


def reestimated(model: Model, images: Split) -> Model:
    """The model with batch statistics of the images."""
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


def matched(model: Model, dense: Model, images: Split) -> Model:
    """The model with batch statistics moved by as much as pruning moved them."""
    graph = copy.deepcopy(model.graph)
    with torch.no_grad():
        match_statistics(dense.graph, graph, images)
    return replace(model, graph=graph)


def main() -> None:
    """Measures and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", nargs="*", help="methods to measure anew, by a part of their names")
    parser.add_argument("--models", nargs="*", help="of these models alone")
    arguments = parser.parse_args()

    def due(model: str, method: str) -> bool:
        parts = arguments.again
        return (parts is None or any(part in method for part in parts)) and model in (arguments.models or [model])

    earlier = rows_of("one_shot") if arguments.again or arguments.models else []
    rows = [row for row in earlier if not due(row["model"], row["method"].partition(" + ")[0])]

    def add(row: dict[str, Any]) -> None:
        print(row, flush=True)
        rows.append(row)

    for name, module, model in models():
        normed = any(isinstance(m, _BatchNorm) for m in model.graph.modules())
        dense, labels = logits(model, fashion_data(model.source))
        top1 = float((dense.argmax(1) == labels).double().mean())
        if due(name, "dense"):
            add({"model": name, "method": "dense", "top1": top1, "images": len(labels)})
        for pattern in PATTERNS:
            names = [layer for layer, reason in eligible(model, pattern).items() if reason is None]
            for method, prune in methods(module, pattern, names).items():
                if not due(name, method):
                    continue
                seedless = method == "magnitude"
                for seed in SEEDS if normed or not seedless else SEEDS[:1]:
                    data = fashion_data(model.source, seed=seed)
                    start = time.perf_counter()
                    result = prune(model, data)
                    seconds = time.perf_counter() - start
                    row = {"model": name, "pattern": str(pattern), "seed": seed, "layers": len(names)}
                    if not seedless or seed == SEEDS[0]:
                        add(row | {"method": method, "seconds": seconds} | measured(result, data, dense))
                    if not normed or method in REFITTED:
                        continue
                    repaired = {"moved": matched(result, model, data.calibration)}
                    if pattern == PATTERNS[0]:
                        repaired["re-estimated"] = reestimated(result, data.calibration)
                    for how, other in repaired.items():
                        told = {"method": f"{method} + statistics {how}", "seconds": seconds}
                        add(row | told | measured(other, data, dense))
        libraries = ("torch", "timm")
        write("one_shot", __doc__.partition("\n")[0], "cpu", libraries, rows)
    (RESULTS / "one_shot.md").write_text(show(rows), encoding="utf-8")


def cell(rows: list[dict[str, Any]]) -> tuple[str, str]:
    """Top-1 with its range over seeds, and the logit shift with its."""
    if not rows:
        return "–", "–"
    tops, shifts = [100 * row["top1"] for row in rows], [row["logit_shift"] for row in rows]
    spread = (f" [{min(tops):.1f}, {max(tops):.1f}]", f" [{min(shifts):.3f}, {max(shifts):.3f}]")
    several = len(rows) > 1
    return (
        f"{np.mean(tops):.2f}{spread[0] if several else ''}",
        f"{np.mean(shifts):.3f}{spread[1] if several else ''}",
    )


def show(rows: list[dict[str, Any]]) -> str:
    """A table a model: top-1 and logit shift at each pattern, and seconds at 2:4."""
    parts = [
        "# One-shot masks and refits\n",
        "Top-1 in per cent on 2,000 held-out images, and the mean largest change of a logit [lowest, highest of three "
        "seeds]; seconds to prune at 2:4, with calibration, on one or two cores that other work shared.\n",
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
