"""Accuracy of EfficientNet-Lite0 on ImageNet at 2:4, without training -> results/one_shot_imagenet.{json,md}.

    python benchmarks/one_shot_imagenet.py --images FOLDER     # weights: make bench-models

The model has its own head, and images have 224 pixels. FOLDER has one folder per class, named so that their order is
that of ImageNet's classes (n01440764, …). The results in the repository are from one image per class, short side 256,
almost surely from the training set: dense top-1 is higher than on the validation set. So read the change of top-1, not
top-1 itself. 600 images are the calibration set, the others are held out.

- `repair` also refits the depthwise convolutions between masked layers (passes/reconstruct/dense_layers.py).
- `residual` refits the last layer of a branch to the residual sum that it enters (passes/reconstruct/residual.py).

With both, channels are ordered with Permute's score `refit`, else with `magnitude`. `repair`, `residual` and this order
were developed on another split of the same images.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from budget import logits
from lib.common import RESULTS, markdown, rows_of, write
from lib.pretrained import efficientnet_lite0

from mpcompile.data.loading import load_data
from mpcompile.frontend.capture import capture
from mpcompile.frontend.preprocessing import source_of
from mpcompile.ir.pattern import NM
from mpcompile.measure.changed_answers import ChangedAnswers
from mpcompile.passes import NMMask, Permute
from mpcompile.pipeline.pass_manager import PassManager

QUESTION = "How much of EfficientNet-Lite0's accuracy at 224 pixels is kept at 2:4 without training?"
CALIBRATION = 600  # images
PATTERN = NM(2, 4)
METHODS = {
    "largest weights, no refit": (NMMask(PATTERN, "magnitude", "none"),),
    "joint, permutation, refit": (Permute(score="magnitude"), NMMask(PATTERN, repair=False, residual=False)),
    "joint, permutation, refit, repair": (Permute(score="magnitude"), NMMask(PATTERN, residual=False)),
    "joint, permutation, refit, repair, residual (ours)": (Permute(), NMMask(PATTERN)),
}
COLUMNS = ("method", "seed", "top-1", "of dense", "became right, became wrong", "same answer", "logit shift", "s")


def compared(pruned: torch.Tensor, dense: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Compares the logits (n, classes) of the pruned and the dense model, and returns the accuracy keys of a row."""
    correct, dense_correct = (logits.argmax(1) == labels for logits in (pruned, dense))
    changed = ChangedAnswers.between(dense_correct.numpy(), correct.numpy())
    return {
        "top1": float(correct.double().mean()),
        "dense_top1": float(dense_correct.double().mean()),
        "right": changed.right,
        "wrong": changed.wrong,
        "agreement": float((pruned.argmax(1) == dense.argmax(1)).double().mean()),
        "logit_shift": float((pruned - dense).abs().amax(1).mean()),
        "images": len(labels),
    }


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Returns the row as cells of the table."""
    return (
        row["method"], str(row["seed"]), f"{row['top1']:.2%} of {row['dense_top1']:.2%}",
        f"{row['top1'] / row['dense_top1']:.1%}", f"{row['right']}, {row['wrong']}", f"{row['agreement']:.1%}",
        f"{row['logit_shift']:.2f}", f"{row['seconds']:.0f}",
    )  # fmt: skip


def main() -> None:
    """Measures, and writes both results files after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder with one folder of images per class")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="rows of other seeds are kept")
    parser.add_argument("--again", default="", help="measure only methods whose names contain this; others are kept")
    arguments = parser.parse_args()
    module = efficientnet_lite0()
    model = capture(module, source_of(module, name="efficientnet_lite0", arch="tf_efficientnet_lite0", sha256=""))
    rows = [
        row
        for row in rows_of("one_shot_imagenet")
        if row["method"] in METHODS and (row["seed"] not in arguments.seeds or arguments.again not in row["method"])
    ]
    for seed in arguments.seeds:
        data = load_data(arguments.images, model.source, 1000, CALIBRATION, seed=seed, validation=0)
        dense, labels = logits(model, data)
        for method, passes in METHODS.items():
            if arguments.again not in method:
                continue
            started = time.perf_counter()
            result, _ = PassManager(passes).run(model, data.for_passes())
            row = {"method": method, "seed": seed, "seconds": time.perf_counter() - started}
            rows.append(row | compared(logits(result, data)[0], dense, labels))
            print(cells(rows[-1]), flush=True)
            report(sorted(rows, key=lambda row: (row["seed"], [*METHODS].index(row["method"]))))


def report(rows: list[dict[str, Any]]) -> None:
    """Writes both results files with the rows measured so far."""
    write("one_shot_imagenet", QUESTION, "cpu", ("torch", "timm"), rows)
    setting = (
        f"Each seed selects {CALIBRATION} calibration images and {rows[0]['images']} held-out images. Became right: "
        "answers that are wrong with the dense model and right with the pruned one. Became wrong: the reverse."
    )
    text = f"# EfficientNet-Lite0 at 224 pixels\n\n{QUESTION}\n\n{setting}\n\n{markdown(COLUMNS, [*map(cells, rows)])}"
    (RESULTS / "one_shot_imagenet.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
