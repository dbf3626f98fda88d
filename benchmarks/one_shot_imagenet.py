"""EfficientNet-Lite0 with its own head at 224 pixels, 2:4, without any training -> results/one_shot_imagenet.{json,md}.

    python benchmarks/one_shot_imagenet.py --images FOLDER     # weights: make bench-models

FOLDER has one folder a class, named so that their order is that of ImageNet's classes (n01440764, …). The figures in
the repository are from one image a class, short side 256, almost surely of the training set: the dense model gets more
of them right than of the validation set, and what is to be read is how much of that is kept. 600 images calibrate, the
others are held out. `repair` fits the depthwise convolutions between the masked layers along
(passes/reconstruct/dense_layers.py), `residual` the last layer of a branch to the sum that it goes into
(passes/reconstruct/residual.py); with both, channels are ordered by what a refit loses, else by |W|. Both, and that
order, were tried out on another split of the same images.
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
from mpcompile.measure.accuracy import ChangedAnswers
from mpcompile.passes import NMMask, Permute
from mpcompile.pipeline.pass_manager import PassManager

QUESTION = "how much of EfficientNet-Lite0's accuracy at 224 pixels is kept at 2:4 without training?"
CALIBRATION = 600
PATTERN = NM(2, 4)
METHODS = {
    "largest weights, no refit": (NMMask(PATTERN, "magnitude", "none"),),
    "joint, permutation, refit": (Permute(score="magnitude"), NMMask(PATTERN, repair=False, residual=False)),
    "joint, permutation, refit, repair": (Permute(score="magnitude"), NMMask(PATTERN, residual=False)),
    "joint, permutation, refit, repair, residual (ours)": (Permute(), NMMask(PATTERN)),
}
COLUMNS = ("method", "seed", "top-1", "of dense", "answers put right, put wrong", "same answer", "logit shift", "s")


def measured(found: torch.Tensor, dense: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """What is said of one model against the dense one."""
    right, before = (z.argmax(1) == labels for z in (found, dense))
    turned = ChangedAnswers.between(before.numpy(), right.numpy())
    return {
        "top1": float(right.double().mean()),
        "dense_top1": float(before.double().mean()),
        "right": turned.right,
        "wrong": turned.wrong,
        "agreement": float((found.argmax(1) == dense.argmax(1)).double().mean()),
        "logit_shift": float((found - dense).abs().amax(1).mean()),
        "images": len(labels),
    }


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table."""
    return (
        row["method"], str(row["seed"]), f"{row['top1']:.2%} of {row['dense_top1']:.2%}",
        f"{row['top1'] / row['dense_top1']:.1%}", f"{row['right']}, {row['wrong']}", f"{row['agreement']:.1%}",
        f"{row['logit_shift']:.2f}", f"{row['seconds']:.0f}",
    )  # fmt: skip


def main() -> None:
    """Measures, and writes both files after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="rows of other seeds stay")
    parser.add_argument("--again", default="", help="methods to measure anew, by a part of their names")
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
            rows.append(row | measured(logits(result, data)[0], dense, labels))
            print(cells(rows[-1]), flush=True)
            report(sorted(rows, key=lambda row: (row["seed"], [*METHODS].index(row["method"]))))


def report(rows: list[dict[str, Any]]) -> None:
    """Both files."""
    write("one_shot_imagenet", QUESTION, "cpu", ("torch", "timm"), rows)
    said = (
        f"{rows[0]['images']} held-out images a seed, which chooses them and the {CALIBRATION} that calibrate. Answers "
        "put right and put wrong are against the dense model on the same images."
    )
    text = f"# EfficientNet-Lite0 at 224 pixels\n\n{QUESTION}\n\n{said}\n\n{markdown(COLUMNS, [*map(cells, rows)])}"
    (RESULTS / "one_shot_imagenet.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
