"""Accuracy that a short distillation recovers, on the trained example -> results/distill.{json,md}.

    python benchmarks/distill.py --data /usr/share/datasets/fashion-mnist

--data has the four files of Fashion-MNIST (Debian's package dataset-fashion-mnist). The model gets 2:4 in every
eligible layer and token merging, and is measured before and after training. The methods are:

- joint masks with refit;
- the same, trained without labels, only on the dense model's outputs;
- magnitude masks without refit;
- magnitude masks that are soft in the first half of the training.

All methods train with the same settings, for three epochs on the same 10,000 images. Accuracy is measured on all 10,000
test images. The learning rate was chosen on validation images from the training set, with 20,000 training images.
"""

import argparse
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lib.common import RESULTS, ROOT, markdown, write

from mpcompile.analysis.block_macs import charged
from mpcompile.data.images import Data, Split
from mpcompile.data.npz import ArrayImages
from mpcompile.frontend.capture import capture
from mpcompile.frontend.load_model import Request, load
from mpcompile.ir.model import Model
from mpcompile.ir.source import Source
from mpcompile.passes import Distill, NMMask, Permute, ToMe
from mpcompile.pipeline.pass_manager import Pass, PassManager

EXAMPLE = ROOT / "examples" / "fashion_vit"
sys.path.insert(0, str(EXAMPLE))

from fashion_mnist import read_split  # noqa: E402

QUESTION = "How much of the accuracy lost by 2:4 and token merging does a short distillation recover?"
TOKENS = ToMe(r="8:decreasing")
TRAINING = 10_000  # images
COLUMNS = ("method", "seeds", "dense top-1", "one-shot", "after training", "recovered", "logit shift", "minutes")


def training(rate: float, **options: Any) -> Distill:
    """Returns the Distill pass of all methods: settings for this small model, else the defaults of the pass."""
    return Distill(epochs=3, batch=64, rate=rate, warmup=100, scale=0.7, erasing=0.0, **options)


def methods(rate: float, seed: int) -> Mapping[str, tuple[list[Pass], Distill]]:
    """Returns, by method, the passes before the training, and the training."""
    joint: list[Pass] = [Permute(), NMMask(), TOKENS]
    largest: list[Pass] = [NMMask(criterion="magnitude", refit="none"), TOKENS]
    compared = {
        "joint, refit (ours)": (joint, training(rate, seed=seed)),
        "joint, refit; dense model's answers alone": (joint, training(rate, seed=seed, alpha=1.0)),
        "largest weights": (largest, training(rate, seed=seed)),
    }
    # An option of the pass rather than a method of its own, so one seed is enough.
    soft = {"largest weights, masks soft for half": (largest, training(rate, seed=seed, soft=0.5))}
    return compared if seed else compared | soft


def data_of(folder: Path, source: Source, seed: int) -> Data:
    """Returns calibration, training and validation images chosen by the seed; all test images are held out."""
    order = np.random.default_rng(seed).permutation(60_000)

    def split(name: str, chosen: "np.ndarray") -> Split:
        images, labels = read_split(folder, name)
        mean, std = torch.tensor(source.mean), torch.tensor(source.std)
        return Split(
            ArrayImages(images[..., None].copy(), labels, 10, mean, std), tuple(chosen.tolist()), labelled=True
        )

    return Data(
        calibration=split("train", order[:256]),
        training=split("train", order[:TRAINING]),
        validation=split("train", order[-5000:]),
        held_out=split("t10k", np.arange(10_000)),
    )


@torch.no_grad()
def measured(model: Model, dense: Model, images: Split) -> dict[str, float]:
    """Returns top-1 and the logit shift: the largest change of a logit, averaged over images."""
    hits, shift = 0, 0.0
    for pixels, labels in images.batches(500):
        logits = model(pixels)
        hits += int((logits.argmax(1) == labels).sum())
        shift += float((logits - dense(pixels)).abs().amax(1).sum())
    return {"top1": hits / len(images), "shift": shift / len(images)}


def measure(folder: Path, rate: float, seed: int, name: str) -> dict[str, Any]:
    """Prunes and trains with one method and seed, on one thread, and returns the row."""
    torch.set_num_threads(1)
    loaded = load(Request(str(EXAMPLE / "model.safetensors")))
    dense, data = capture(loaded.module, loaded.source), data_of(folder, loaded.source, seed)
    before, train = methods(rate, seed)[name]
    one_shot, _ = PassManager(before).run(dense, data)
    started = time.perf_counter()
    trained, _ = PassManager([train]).run(one_shot, data)
    minutes = (time.perf_counter() - started) / 60
    masks = {layer: plan.mask for layer, plan in trained.plan.items() if plan.mask is not None}
    assert all((trained.layer(layer).weight[~mask] == 0).all() for layer, mask in masks.items())
    cost = charged(dense, trained)
    row = {
        "method": name,
        "seed": seed,
        "macs": cost.compressed / cost.dense,
        "tokens": cost.tokens,
        "dense_top1": measured(dense, dense, data.held_out)["top1"],
        "one_shot": measured(one_shot, dense, data.held_out),
        "trained": measured(trained, dense, data.held_out),
        "minutes": minutes,
        "teacher_losses": [epoch.teacher_loss for epoch in trained.epochs],
        "edges": [epoch.edge for epoch in trained.epochs],
        "spikes": [epoch.spikes for epoch in trained.epochs],
        "training_images": len(data.training),
    }
    print(row, flush=True)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Returns a table with one row per method: means over seeds, with the lowest and the highest seed."""

    def spread(values: list[float], digits: int) -> str:
        return f"{np.mean(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"

    lines = []
    for name in dict.fromkeys(row["method"] for row in rows):
        chosen = [row for row in rows if row["method"] == name]
        dense, before, after = (
            [100 * value for value in values]
            for values in (
                [row["dense_top1"] for row in chosen],
                [row["one_shot"]["top1"] for row in chosen],
                [row["trained"]["top1"] for row in chosen],
            )
        )
        recovered = [(c - b) / (a - b) for a, b, c in zip(dense, before, after, strict=True)]
        shifts = (
            np.mean([row["one_shot"]["shift"] for row in chosen]),
            np.mean([row["trained"]["shift"] for row in chosen]),
        )
        lines.append(
            (
                name,
                str(len(chosen)),
                f"{dense[0]:.2f}",
                spread(before, 2),
                spread(after, 2),
                f"{np.mean(recovered):.0%} [{min(recovered):.0%}, {max(recovered):.0%}]",
                f"{shifts[0]:.3f}, then {shifts[1]:.3f}",
                f"{np.mean([row['minutes'] for row in chosen]):.1f}",
            )
        )
    return markdown(COLUMNS, lines)


def print_rates(folder: Path, rates: tuple[float, ...]) -> None:
    """Prints the validation accuracy of the first method at several learning rates, with one seed."""
    loaded = load(Request(str(EXAMPLE / "model.safetensors")))
    dense = capture(loaded.module, loaded.source)
    data = data_of(folder, loaded.source, 0)
    before, _ = methods(1e-4, 0)["joint, refit (ours)"]
    start, _ = PassManager(before).run(dense, data)
    print("one-shot", measured(start, dense, data.validation), flush=True)
    for rate in rates:
        trained, _ = PassManager([training(rate)]).run(start, data)
        print(rate, measured(trained, dense, data.validation), flush=True)


def main() -> None:
    """Measures, and writes both results files; with --choose, only prints validation accuracies."""
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--data", type=Path, required=True, help="folder with the four Fashion-MNIST .gz files")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--processes", type=int, default=2, help="trainings at the same time, one thread each")
    parser.add_argument("--choose", action="store_true", help="only compare learning rates, on validation images")
    args = parser.parse_args()
    if args.choose:
        print_rates(args.data, (1e-4, 3e-4, 1e-3))
        return
    tasks = [(seed, name) for seed in range(args.seeds) for name in methods(args.rate, seed)]
    with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
        futures = [pool.submit(measure, args.data, args.rate, seed, name) for seed, name in tasks]
        rows = [future.result() for future in futures]
    write("distill", QUESTION, "CPU, PyTorch, one thread", ("torch", "timm"), rows)
    (RESULTS / "distill.md").write_text(f"# A short distillation\n\n{QUESTION}\n\n{table(rows)}", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
