"""What a short distillation gives back, on the trained example -> results/distill.{json,md}.

    python benchmarks/distill.py --data /usr/share/datasets/fashion-mnist

The data are Fashion-MNIST's four files (Debian's package dataset-fashion-mnist). 2:4 in every eligible layer and token
merging, before and after training on the same 10,000 images for three epochs: joint masks with their refit, the same
with the dense model's answers alone (no labels), and the largest weights, once with masks that are soft at first. Every
method trains alike. Accuracy on all 10,000 test images; the rate was chosen on training images (validation), with
twice as many to train on.
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
from mpcompile.ir.model import Model, Source
from mpcompile.passes import Distill, NMMask, Permute, ToMe
from mpcompile.pipeline.pass_manager import Pass, PassManager

EXAMPLE = ROOT / "examples" / "fashion_vit"
sys.path.insert(0, str(EXAMPLE))

from fashion_mnist import read_split  # noqa: E402

QUESTION = "how much of what 2:4 and token merging lose does a short distillation give back?"
TOKENS = ToMe(r="8:decreasing")
TRAINING = 10_000
COLUMNS = ("method", "seeds", "dense top-1", "one-shot", "after training", "given back", "logit shift", "minutes")


def training(rate: float, **options: Any) -> Distill:
    """The same for every method: what fits this small model, the rest as the pass has it."""
    return Distill(epochs=3, batch=64, rate=rate, warmup=100, scale=0.7, erasing=0.0, **options)


def methods(rate: float, seed: int) -> Mapping[str, tuple[list[Pass], Distill]]:
    """Passes before the training, and the training."""
    joint: list[Pass] = [Permute(), NMMask(), TOKENS]
    largest: list[Pass] = [NMMask(criterion="magnitude", refit="none"), TOKENS]
    found = {
        "joint, refit (ours)": (joint, training(rate, seed=seed)),
        "joint, refit; dense model's answers alone": (joint, training(rate, seed=seed, alpha=1.0)),
        "largest weights": (largest, training(rate, seed=seed)),
    }
    # An option, not a rival: one seed tells whether it is worth having.
    soft = {"largest weights, masks soft for half": (largest, training(rate, seed=seed, soft=0.5))}
    return found if seed else found | soft


def data_of(folder: Path, source: Source, seed: int) -> Data:
    """Calibration, validation and training images by the seed; all test images held out."""
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
    """Top-1 and the mean largest change of a logit."""
    hits, shift = 0, 0.0
    for pixels, labels in images.batches(500):
        found = model(pixels)
        hits += int((found.argmax(1) == labels).sum())
        shift += float((found - dense(pixels)).abs().amax(1).sum())
    return {"top1": hits / len(images), "shift": shift / len(images)}


def measure(folder: Path, rate: float, seed: int, name: str) -> dict[str, Any]:
    """The row for one method and seed, on one thread."""
    torch.set_num_threads(1)
    loaded = load(Request(str(EXAMPLE / "model.safetensors")))
    dense, data = capture(loaded.module, loaded.source), data_of(folder, loaded.source, seed)
    before, train = methods(rate, seed)[name]
    one_shot, _ = PassManager(before).run(dense, data)
    began = time.perf_counter()
    trained, _ = PassManager([train]).run(one_shot, data)
    minutes = (time.perf_counter() - began) / 60
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
    """A row for each method, means with the spread of the seeds."""

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
        back = [(c - b) / (a - b) for a, b, c in zip(dense, before, after, strict=True)]
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
                f"{np.mean(back):.0%} [{min(back):.0%}, {max(back):.0%}]",
                f"{shifts[0]:.3f}, then {shifts[1]:.3f}",
                f"{np.mean([row['minutes'] for row in chosen]):.1f}",
            )
        )
    return markdown(COLUMNS, lines)


def chosen_rate(folder: Path, rates: tuple[float, ...]) -> None:
    """Prints validation accuracy of the first method at several rates, one seed."""
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
    """Writes both files."""
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--data", type=Path, required=True, help="folder with the four Fashion-MNIST .gz files")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2, help="that train side by side, a thread each")
    parser.add_argument("--choose", action="store_true", help="only compare rates, on validation images")
    args = parser.parse_args()
    if args.choose:
        chosen_rate(args.data, (1e-4, 3e-4, 1e-3))
        return
    tasks = [(seed, name) for seed in range(args.seeds) for name in methods(args.rate, seed)]
    with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
        asked = [pool.submit(measure, args.data, args.rate, seed, name) for seed, name in tasks]
        rows = [task.result() for task in asked]
    write("distill", QUESTION, "CPU, PyTorch, one thread", ("torch", "timm"), rows)
    (RESULTS / "distill.md").write_text(f"# A short distillation\n\n{QUESTION}\n\n{table(rows)}", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
