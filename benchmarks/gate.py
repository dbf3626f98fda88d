"""How many mistakes of preprocessing and labels does the check of the dense model notice? -> results/gate.{json,md}.

    python benchmarks/gate.py

The example's ViT on its 2,000 held-out images of Fashion-MNIST: 200 planted mistakes, and 50 right set-ups, which are
random subsets of 100 to 700 images. A mistake is noticed if the gate of `--max-drop` fails whatever the drop is.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lib.common import RESULTS, ROOT, markdown, write
from numpy.typing import NDArray
from torch import Tensor

from mpcompile.data.images import Split
from mpcompile.data.npz import ArrayImages
from mpcompile.frontend.load_model import Request, load
from mpcompile.ir.head import Head
from mpcompile.measure.dense_check import check_dense
from mpcompile.measure.preprocessing_check import better_preprocessing

EXAMPLE = ROOT / "examples" / "fashion_vit"
COUNT = 100  # images of a mistake of preprocessing
Outputs = NDArray[np.float32]


def label_orders(rng: np.random.Generator) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """150 wrong orders of 10 labels."""
    for shift in range(1, 10):
        yield "labels shifted", (np.arange(10) + shift) % 10
    for _ in range(111):
        yield "labels permuted", rng.permutation(10)
    for _ in range(30):
        one, other = rng.choice(10, 2, replace=False)
        order = np.arange(10)
        order[[one, other]] = other, one
        yield "two labels swapped", order


def wrong_pixels(images: Tensor, rng: np.random.Generator) -> Iterator[tuple[str, Tensor]]:
    """25 batches of pixels in [0, 1] that were sized, cropped or turned wrongly."""
    size = images.shape[-1]
    for _ in range(8):
        side = int(rng.integers(7, 24))
        small = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
        yield "resolution lost", F.interpolate(small, size=(size, size), mode="bilinear")
    for _ in range(8):
        edge = int(rng.integers(1, 8))
        inner = images[..., edge : size - edge, edge : size - edge]
        yield "cropped too much", F.interpolate(inner, size=(size, size), mode="bilinear")
    for columns in range(4):
        yield "grey values inverted", 1 - images.roll(columns, -1)
    for turns in (1, 2, 3, 1, 3):
        yield "turned", images.rot90(turns, (2, 3))


def measure() -> list[dict[str, Any]]:
    """One row for each set-up: kind, accuracy, and whether it was noticed."""
    rng = np.random.default_rng(0)
    loaded = load(Request(str(EXAMPLE / "model.safetensors")))
    module, source = loaded.module, loaded.source
    arrays = np.load(EXAMPLE / "images.npz")
    pixels, labels = arrays["heldout_images"], arrays["heldout_labels"].astype(np.int64)

    def run(batch: Outputs) -> Outputs:
        with torch.no_grad():
            return module(torch.from_numpy(batch)).numpy()  # type: ignore[no-any-return]

    def row(
        kind: str, outputs: Outputs, answers: NDArray[np.int64], mean: float, std: float, given: Any
    ) -> dict[str, Any]:
        reasons = check_dense(outputs, answers, Head()).reasons
        if given is not None:
            images = ArrayImages(given, answers, 10, torch.tensor([mean]), torch.tensor([std]))
            split = Split(images, tuple(range(len(given))), labelled=True)
            better = better_preprocessing(run, split, (mean,), (std,), Head())
            reasons = (better, *reasons) if better else reasons
        right = float((outputs.argmax(1) == answers).mean())
        return {"kind": kind, "accuracy": right, "noticed": bool(reasons), "reason": reasons[0] if reasons else None}

    def outputs_of(images: Tensor, mean: float, std: float) -> Outputs:
        return np.concatenate([run(((part - mean) / std).numpy()) for part in images.split(100)])

    mean, std = source.mean[0], source.std[0]
    some, answers = torch.from_numpy(pixels[:COUNT, None]).float() / 255, labels[:COUNT]
    right = outputs_of(torch.from_numpy(pixels[:700, None]).float() / 255, mean, std)
    rows = []
    for number in range(50):
        chosen = rng.choice(700, int(rng.integers(100, 700)), replace=False)
        given = pixels[chosen][:COUNT, ..., None] if number < 5 else None
        chosen = chosen[:COUNT] if number < 5 else chosen
        rows.append(row("right", right[chosen], labels[chosen], mean, std, given))
    rows += [row(kind, right[:400], order[labels[:400]], mean, std, None) for kind, order in label_orders(rng)]
    for _ in range(20):
        m, s = float(rng.uniform(-0.2, 1)), float(np.exp(rng.uniform(np.log(0.05), np.log(2))))
        rows.append(row("mean and deviation", outputs_of(some, m, s), answers, m, s, pixels[:COUNT, ..., None]))
    for kind, images in wrong_pixels(some, rng):
        rows.append(row(kind, outputs_of(images, mean, std), answers, mean, std, None))
    state = {name: value.clone() for name, value in module.state_dict().items()}
    for block in range(5):  # a file of another model: one block's weights in another order
        with torch.no_grad():
            for name, value in module.named_parameters():
                if name.startswith(f"blocks.{block}.") and value.ndim == 2:
                    value.copy_(value[torch.from_numpy(rng.permutation(len(value)))])
        rows.append(row("other weights", outputs_of(some, mean, std), answers, mean, std, None))
        module.load_state_dict(state)
    return rows


def page(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown: one line for each kind."""
    table = []
    clean = float(np.mean([row["accuracy"] for row in rows if row["kind"] == "right"]))
    for kind in dict.fromkeys(row["kind"] for row in rows):
        of_kind = [row for row in rows if row["kind"] == kind]
        costly = [row for row in of_kind if row["accuracy"] < clean - 0.1]
        counts = (len(of_kind), _noticed(of_kind), len(costly), _noticed(costly))
        table.append((kind, *map(str, counts)))
    heads = ("set-up", "count", "noticed", "cost more than 10 points", "of these noticed")
    return f"# What the check of the dense model notices\n\n{markdown(heads, table)}"


def _noticed(rows: list[dict[str, Any]]) -> int:
    return sum(row["noticed"] for row in rows)


def main() -> None:
    """Measures and writes results/gate.{json,md}."""
    rows = measure()
    question = "How many mistakes of preprocessing and labels does the check of the dense model notice?"
    write("gate", question, "CPU", ("torch", "timm"), rows)
    (RESULTS / "gate.md").write_text(page(rows), encoding="utf-8")
    print(page(rows))


if __name__ == "__main__":
    main()
