"""How many mistakes of preprocessing, labels and weights fail the gate of --max-drop? -> results/gate.{json,md}.

    python benchmarks/gate.py --images FOLDER     # weights: make bench-models

Two models, with 200 planted mistakes and 50 right set-ups each (benchmarks/lib/planted_mistakes.py):

- the example's ViT on its 2,000 held-out images of Fashion-MNIST, written as PNG files into class folders;
- EfficientNet-Lite0 with its ImageNet head on FOLDER: one folder for each class, named so that their order is that of
  ImageNet's classes (n01440764, …). The results in the repository are from one image of each class, short side 256,
  almost surely from the training set. These images are for research and may not be redistributed. Without --images,
  only the ViT is measured, and earlier rows of EfficientNet-Lite0 are kept.

A mistake is noticed if the gate fails whatever the drop is. The checks are called as `compile` calls them: on an ONNX
Runtime engine of the exported model, with all held-out images of a run.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lib.common import RESULTS, ROOT, markdown, rows_of, write
from lib.planted_mistakes import FEWEST, LABELS, RIGHT, VALUES, Planted, mistakes_of, right_set_ups
from lib.pretrained import efficientnet_lite0
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from mpcompile.data.folder import FolderImages
from mpcompile.data.images import Split
from mpcompile.data.loading import load_data
from mpcompile.data.transform import evaluation_transform
from mpcompile.export.onnx_export import lower
from mpcompile.frontend.capture import capture
from mpcompile.frontend.load_model import Request, load
from mpcompile.frontend.preprocessing import source_of
from mpcompile.ir.source import Source
from mpcompile.measure.checked_comparison import checked_comparison
from mpcompile.runtimes.ort.session import cpu_engine

QUESTION = "How many mistakes of preprocessing, labels and weights fail the gate of --max-drop?"
EXAMPLE = ROOT / "examples" / "fashion_vit"
VIT, CNN = "the example's ViT", "EfficientNet-Lite0"
SET_UPS = 250  # of each model
COSTLY = 0.10  # loss of accuracy, as a share of the images
Outputs = NDArray[np.float32]
Run = Callable[[Outputs], Outputs]


@dataclass(frozen=True)
class AlteredImages(FolderImages):
    """Image files that are decoded once, and are altered before the transform. `kept` keeps preprocessed images."""

    alter: Callable[[Any], Any] | None = None
    kept: dict[int, Tensor] | None = None

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The preprocessed image and its label."""
        if self.kept is None:
            return super().__getitem__(index)
        if index not in self.kept:
            self.kept[index] = super().__getitem__(index)[0]
        return self.kept[index], self.labels[index]

    def picture(self, index: int) -> tuple[Any, int]:
        """The picture, altered, and its label."""
        picture = _decoded(self.paths[index], self.mode)
        return picture if self.alter is None else self.alter(picture), self.labels[index]


@cache
def _decoded(path: Path, mode: str) -> Any:
    with Image.open(path) as picture:
        return picture.convert(mode)


class Remembering:
    """An engine that runs each image once: many set-ups try the same preprocessing of the same image.

    Images are told apart by every fourth pixel of every fourth row, and run one by one, which is faster than a batch.
    """

    def __init__(self, engine: Run) -> None:
        self.engine = engine
        self.outputs: dict[bytes, Outputs] = {}

    def __call__(self, images: Outputs) -> Outputs:
        """Outputs (b, outputs) of images (b, c, h, w)."""
        keys = [blake2b(image[:, ::4, ::4].tobytes(), digest_size=16).digest() for image in images]
        for i, key in enumerate(keys):
            if key not in self.outputs:
                self.outputs[key] = self.engine(images[i : i + 1])[0]
        return np.stack([self.outputs[key] for key in keys])


class Bench:
    """A right model with its labelled images, on which set-ups are tried."""

    def __init__(self, name: str, module: nn.Module, source: Source, folder: Path, threads: int) -> None:
        self.name, self.module, self.source, self.threads = name, module, source, threads
        with torch.no_grad():
            classes = module(torch.zeros(1, *source.size)).shape[1]
        data = load_data(folder, source, classes)
        assert isinstance(data.held_out.images, FolderImages)
        self.files = data.held_out.images
        self.held_out = np.array(data.held_out.order)
        self.engine = Remembering(self.engine_of(source))
        self.kept: dict[int, Tensor] = {}
        split = Split(self.images(source), tuple(self.held_out.tolist()), labelled=True)
        batches = [self.engine(pixels.numpy()).argmax(1) == labels.numpy() for pixels, labels in split.batches()]
        self.right = dict(zip(split.order, np.concatenate(batches).tolist(), strict=True))

    def images(self, source: Source, alter: Callable[[Any], Any] | None = None) -> AlteredImages:
        """The image files with the preprocessing of a source."""
        files = replace(self.files, transform=evaluation_transform(source))
        kept = self.kept if source is self.source and alter is None else None
        given = {name: getattr(files, name) for name in files.__dataclass_fields__}
        return AlteredImages(**given, alter=alter, kept=kept)

    def engine_of(self, source: Source, weights: Any = None) -> Run:
        """The engine that `compile` builds of the model with other weights or another input size."""
        right = {name: value.clone() for name, value in self.module.state_dict().items()}
        self.module.load_state_dict(right if weights is None else weights)
        with tempfile.TemporaryDirectory() as folder:
            engine = cpu_engine(lower(capture(self.module, source), Path(folder) / "dense.onnx"), self.threads)
        self.module.load_state_dict(right)
        return engine

    def row(self, planted: Planted) -> dict[str, Any]:
        """The accuracy of a set-up, that of the right one on the same images, and whether the gate fails."""
        started = time.perf_counter()
        chosen = self.held_out if planted.chosen is None else planted.chosen
        images = self.images(planted.source, planted.alter)
        if planted.order is not None:
            images = replace(images, labels=tuple(planted.order[list(images.labels)].tolist()))
        engine: Run = self.engine
        if planted.weights is not None or planted.source.size != self.source.size:
            engine = Remembering(self.engine_of(planted.source, planted.weights))
        split = Split(images, tuple(chosen.tolist()), labelled=True)
        claimed = float(np.mean([*self.right.values()])) if planted.claimed else None
        found = checked_comparison(engine, engine, split, planted.source, None, claimed)
        assert found.dense is not None
        assert found.dense_check is not None
        return {
            "model": self.name,
            "kind": planted.kind,
            "detail": planted.detail,
            "images": len(split),
            "accuracy": found.dense.top1,
            "right": float(np.mean([self.right[index] for index in chosen])),
            "noticed": bool(found.dense_check.reasons),
            "reasons": list(found.dense_check.reasons),
            "seconds": round(time.perf_counter() - started, 1),
        }


def vit(folder: Path, threads: int) -> Bench:
    """The example's ViT; its images are written into the folder."""
    loaded = load(Request(str(EXAMPLE / "model.safetensors")))
    arrays = np.load(EXAMPLE / "images.npz")
    for split in ("calibration", "heldout"):
        for index, (pixels, label) in enumerate(
            zip(*(arrays[f"{split}_{n}"] for n in ("images", "labels")), strict=True)
        ):
            path = folder / {"calibration": "train", "heldout": "val"}[split] / str(label) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return Bench(VIT, loaded.module, replace(loaded.source, labels=()), folder, threads)


def cnn(folder: Path, threads: int) -> Bench:
    """EfficientNet-Lite0 on images of ImageNet's classes."""
    module = efficientnet_lite0()
    source = source_of(module, name="efficientnet_lite0", arch="tf_efficientnet_lite0", sha256="")
    return Bench(CNN, module, source, folder, threads)


def measure(bench: Bench, earlier: list[dict[str, Any]]) -> None:
    """Measures 50 right set-ups and 200 mistakes in random order, without those in `earlier`; writes after each row."""
    rng = np.random.default_rng(0)
    planted = [*right_set_ups(bench.source, bench.held_out, rng)]
    planted += mistakes_of(bench.module, bench.source, bench.held_out, rng)
    rows = {row["number"]: row for row in earlier}
    for number in np.random.default_rng(1).permutation(len(planted)).tolist():
        if number not in rows:
            rows[number] = {"number": number, **bench.row(planted[number])}
            print(json.dumps(rows[number]), flush=True)
            save(bench.name, [*rows.values()])


def table_of(rows: list[dict[str, Any]]) -> str:
    """One line for each kind of set-up, and one for all mistakes."""
    mistakes = [row for row in rows if row["kind"] != RIGHT]
    groups = {kind: [row for row in rows if row["kind"] == kind] for kind in dict.fromkeys(row["kind"] for row in rows)}
    lines = []
    for kind, group in {**groups, "all mistakes": mistakes}.items():
        costly = [row for row in group if row["right"] - row["accuracy"] > COSTLY]
        counts = (len(group), _noticed(group), len(costly), _noticed(costly))
        lines.append((kind, *map(str, counts)))
    heads = ("set-up", "planted", "noticed", "cost more than 10 points", "of these noticed")
    return markdown(heads, lines)


def _noticed(rows: list[dict[str, Any]]) -> int:
    return sum(row["noticed"] for row in rows)


def page(rows: list[dict[str, Any]], measured: dict[str, Any]) -> str:
    """The results as Markdown, with the environment of the run."""
    text = f"# What the check of the dense model notices\n\n{QUESTION}\n\n"
    text += "; ".join(f"{key}: {value}" for key, value in measured.items()) + ".\n"
    for model in dict.fromkeys(row["model"] for row in rows):
        group = [row for row in rows if row["model"] == model]
        images = [max((row["images"] for row in group if row["kind"] == kind), default=0) for kind in (LABELS, VALUES)]
        partial = (
            "" if len(group) >= SET_UPS else f"{len(group)} of {SET_UPS} set-ups are measured (--resume goes on). "
        )
        text += (
            f"\n## {model}\n\n{partial}Wrong labels are measured on {images[0]:,} held-out images, other mistakes on "
            f"{images[1]:,} of them, and right set-ups on random subsets of {FEWEST} images or more.\n\n"
            f"{table_of(group)}"
        )
    return text


def main() -> None:
    """Measures and writes results/gate.{json,md}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder with one folder of images per ImageNet class")
    parser.add_argument("--threads", type=int, default=1, help="threads of the engine")
    parser.add_argument("--only", choices=("vit", "cnn"), help="measure only this model; rows of the other are kept")
    parser.add_argument("--resume", action="store_true", help="measure only set-ups that the results do not have yet")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, label, build, images in ((VIT, "vit", vit, Path(folder)), (CNN, "cnn", cnn, arguments.images)):
            earlier = [row for row in rows_of("gate") if row.get("model") == name]
            if arguments.only in (None, label) and images is not None:
                measure(build(images, arguments.threads), earlier if arguments.resume else [])
            else:
                reason = "no --images FOLDER" if images is None else f"--only {arguments.only}"
                print(f"{name} is not measured ({reason}); {len(earlier)} earlier rows are kept")
    print((RESULTS / "gate.md").read_text(encoding="utf-8"))


def save(model: str, rows: list[dict[str, Any]]) -> None:
    """Writes results/gate.{json,md} with the rows of a model, and the earlier rows of the other one."""
    whole = [row for row in rows_of("gate") if row.get("model") in {VIT, CNN} - {model}] + rows
    whole.sort(key=lambda row: (row["model"] != VIT, row["number"]))
    path = write("gate", QUESTION, "CPU", ("torch", "timm", "onnxruntime"), whole)
    environment = json.loads(path.read_text(encoding="utf-8"))["environment"]
    (RESULTS / "gate.md").write_text(page(whole, environment), encoding="utf-8")


if __name__ == "__main__":
    main()
