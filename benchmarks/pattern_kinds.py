"""Missed output power of each kind of pattern in layers of EfficientNet-Lite0 -> results/pattern_kinds.{json,md}.

    python benchmarks/pattern_kinds.py --images FOLDER     # weights: make bench-models

Each 1×1 convolution whose width 32 divides is masked alone, on the dense model's inputs (no propagation of errors), by
the criterion joint and a refit to its own dense outputs. Missed power is E‖y − W′x‖² / E‖y‖² on the calibration images.
Channels are not reordered. FOLDER is as for one_shot_imagenet.py.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lib.common import RESULTS, markdown, write
from lib.pretrained import efficientnet_lite0

from mpcompile.analysis.eligibility import eligible
from mpcompile.data.loading import load_data
from mpcompile.frontend.capture import capture
from mpcompile.frontend.preprocessing import source_of
from mpcompile.ir.pattern import NM
from mpcompile.passes import NMMask
from mpcompile.passes.nm_mask.criteria import CRITERIA
from mpcompile.passes.nm_mask.selection import nm_mask
from mpcompile.passes.reconstruct.layerwise import layerwise

QUESTION = "How much output power does each kind of pattern miss in a layer of EfficientNet-Lite0, at equal density?"
IMAGES = 64  # calibration images
WIDEST = 32
PATTERNS = (
    *("16:32", "8:16", "4:8", "2:4", "4:8v16", "4:8v8", "4:8v4", "2:4x2", "2:4x4", "4:8x4"),
    *("8:32", "4:16", "2:8", "1:4", "2:8v8", "1:4x4"),
)
COLUMNS = ("pattern", "missed power, mean", "median", "worst", "over own 2:4 or 1:4", "weight kept, mean", "s")


def main() -> None:
    """Measures, and writes both results files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder with one folder of images per class")
    arguments = parser.parse_args()
    module = efficientnet_lite0()
    model = capture(module, source_of(module, name="efficientnet_lite0", arch="tf_efficientnet_lite0", sha256=""))
    data = load_data(arguments.images, model.source, 1000, IMAGES, seed=0, validation=0)
    names = [name for name, reason in eligible(model, NM(WIDEST // 2, WIDEST)).items() if reason is None]
    missed: dict[str, dict[str, float]] = {text: {} for text in PATTERNS}
    kept: dict[str, dict[str, float]] = {text: {} for text in PATTERNS}
    seconds = dict.fromkeys(PATTERNS, 0.0)
    with torch.no_grad():
        for step in layerwise(model, model.graph, data.calibration, names, sequential=False):
            name, weight = step.weight.names[0], step.layer.weight
            for text in PATTERNS:
                pattern, started = NM.parse(text), time.perf_counter()
                found = NMMask(pattern)._solve(step, pattern, CRITERIA["joint"], "layer")
                seconds[text] += time.perf_counter() - started
                missed[text][name] = float(found["relative_error"])
                power = weight.square()
                kept[text][name] = float(power[nm_mask(power, pattern)].sum() / power.sum())
            print(name, {text: round(by_layer[name], 4) for text, by_layer in missed.items()}, flush=True)
    rows: list[dict[str, Any]] = [
        {"pattern": text, "missed": missed[text], "kept": kept[text], "seconds": seconds[text]} for text in PATTERNS
    ]
    write("pattern_kinds", QUESTION, "cpu", ("torch", "timm"), rows)
    mean = {row["pattern"]: float(np.mean([*row["missed"].values()])) for row in rows}
    cells = []
    for row in rows:
        values, pattern = [*row["missed"].values()], NM.parse(row["pattern"])
        base = mean["2:4" if 2 * pattern.keep == pattern.of else "1:4"]
        cells.append(
            (
                row["pattern"], f"{np.mean(values):.4f}", f"{np.median(values):.4f}", f"{max(values):.4f}",
                f"{np.mean(values) / base:.2f}", f"{np.mean([*row['kept'].values()]):.1%}", f"{row['seconds']:.0f}",
            )
        )  # fmt: skip
    setting = (
        f"{len(names)} layers, {IMAGES} calibration images, criterion joint with the refit to the dense outputs, on "
        "dense inputs. Weight kept: the share of Σ W² that the best mask by magnitude keeps. 4:8v8: at most 8 "
        "patterns in every block of 8 input channels; 2:4x4: 4 neighbouring rows share."
    )
    text = f"# Kinds of patterns\n\n{QUESTION}\n\n{setting}\n\n{markdown(COLUMNS, cells)}"
    (RESULTS / "pattern_kinds.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
