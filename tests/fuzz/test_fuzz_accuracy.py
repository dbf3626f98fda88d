"""Folders whose accuracy is known by construction: it is reported, or a note says what was assumed, or an error does.

The model decides by the grey value of an image, and the name of each file has its decision and its label. So the
accuracy is known without any code that reads folders.
"""

import os
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from known_accuracy import reported, require_right
from mutations import answer, share
from PIL import Image
from torch import Tensor, nn

from mpcompile.data.folder import FolderImages
from mpcompile.data.images import Data
from mpcompile.driver.inputs import data_for
from mpcompile.errors import MpcompileError
from mpcompile.frontend.capture import capture
from mpcompile.ir.model import Model
from mpcompile.ir.source import Source
from mpcompile.measure.comparison import Comparison
from mpcompile.recipe.schema import DataChoice

pytestmark = pytest.mark.filterwarnings("default")  # warnings are errors in the suite, and not where it is used

LABELS = ("dog", "cow", "bee", "ant")  # not in sorted order: sorted folders would be wrong
SIDE, STEP = 4, 60  # pixels, and grey levels between classes
NAMINGS = ("{name}", "{name}", "{name}", "{upper}", "{name} ", "_{name}-", "{index}", "class_{index}", "0{index}")
SPLITS = (
    *(("",), ("",), ("train", "val"), ("Train", "Val"), ("training", "TEST"), ("train2017", "val2017")),
    *(("val", "test"), ("validation",), ("train", "val", "test"), ("train", "validation_set")),
)
WRAPPERS = ("", "", "archive", "data/set")
INNER = ("", "", "", "images", "a/b", "{label}{decision}")
JUNK = (".git", "__MACOSX", "@eaDir", "$RECYCLE.BIN", ".ipynb_checkpoints", "Thumbs.db", ".ant", "lost+found")
KINDS = ("L", "RGB", "P", "CMYK", "LA", "RGBA", "I;16", "F", "jpeg", "gif", "exif", "bmp", "webp")
LINKS = ("class", "outside", "files", "hard", "split", "root")
ASSUMED = ("are assumed to be", "are taken as indices", "innermost folders")  # notes that excuse other labels


class Grey(nn.Module):
    """Decides by the mean grey of an image: 0, 60, 120 and 180 are the classes."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.head = nn.Linear(SIDE * SIDE, 1, bias=False), nn.Linear(1, len(LABELS))
        levels = torch.arange(len(LABELS)) * STEP / 255
        with torch.no_grad():
            self.mean.weight.fill_(1 / SIDE**2)
            self.head.weight.copy_(200 * levels[:, None])
            self.head.bias.copy_(-100 * levels.square())

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.mean(x.flatten(1)))
        return logits


@cache
def model(labels: tuple[str, ...]) -> Model:
    source = Source("m", "", "m", (1, SIDE, SIDE), (0.0,), (1.0,), crop_pct=1.0, labels=labels)
    return capture(Grey(), source)


def written(path: Path, grey: int, kind: str) -> Path:
    """An image of a constant grey; returns its path with the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((SIDE, SIDE), grey, np.uint8)
    image, suffix = Image.fromarray(pixels), ".png"
    options: dict[str, Any] = {}
    if kind == "I;16":
        image = Image.fromarray(pixels.astype(np.uint16) * 257)
    elif kind == "F":
        image, suffix = Image.fromarray(pixels.astype(np.float32)), ".tif"
    elif kind in ("jpeg", "gif", "bmp", "webp"):
        suffix, options = f".{kind}", {"lossless": True} if kind == "webp" else {}
    elif kind == "exif":
        exif = image.getexif()
        exif[0x0112] = 1 + grey // STEP
        suffix, options = ".JPG", {"exif": exif.tobytes()}
    elif kind != "L":
        image, suffix = image.convert("RGB").convert(kind), ".tif" if kind == "CMYK" else ".png"
    path = path.with_name(path.name + suffix)
    image.save(path, **options)
    return path


@dataclass(frozen=True)
class Folders:
    """A data set: how classes are named, its splits, what is around, and which classes and kinds of files it has."""

    naming: str
    splits: tuple[str, ...]
    wrapper: str
    inner: str
    junk: tuple[str, ...]
    kinds: tuple[str, ...]
    classes: tuple[int, ...]
    links: str | None
    class_file: str | None
    wrong: float
    seed: int

    def write(self, root: Path) -> None:
        """Writes the data set; a file's name begins with its label and the decision of the model."""
        rng = np.random.default_rng(self.seed)
        base = root / self.wrapper
        for split in self.splits:
            for label in self.classes:
                name = LABELS[label]
                folder = base / split / self.naming.format(name=name, upper=name.upper(), index=label)
                for number in range(8):
                    decision = int(rng.integers(4)) if rng.random() < self.wrong else label
                    inner = self.inner.format(label=label, decision=decision)
                    path = folder / inner / f"{label}{decision}-{number}"
                    written(path, STEP * decision, self.kinds[number % len(self.kinds)])
            for name in self.junk:
                written(base / split / name / "90-junk", 7, "L")
        names = {self.naming.format(name=n, upper=n.upper(), index=i): i for i, n in enumerate(LABELS)}
        if self.class_file == "classes.txt":
            (base / "classes.txt").write_text("\n".join(name.strip() for name in names) + "\n")
        elif self.class_file == "class_to_idx.json":
            (base / "class_to_idx.json").write_text(str(names).replace("'", '"'))
        self._link(base, root)

    def _link(self, base: Path, root: Path) -> None:
        """Replaces folders or files by links to the same content."""
        away = root.with_name(f"{root.name}-linked")
        shutil.rmtree(away, ignore_errors=True)
        away.mkdir()
        folders = sorted(path for path in (base / self.splits[-1]).iterdir() if path.is_dir() and path.name[0] != ".")
        if self.links == "split" and self.splits[-1]:
            folders = [base / self.splits[-1]]
        elif self.links == "root":
            folders = [base / split for split in self.splits if split]
        if self.links in ("class", "split", "root"):
            for number, folder in enumerate(folders[:2] if self.links == "class" else folders):
                folder.rename(away / str(number))
                folder.symlink_to(away / str(number), target_is_directory=True)
        elif self.links in ("outside", "files", "hard"):
            for number, path in enumerate(sorted(p for p in base.rglob("*-*") if p.is_file())):
                target = away / f"{number}{path.suffix}"
                path.rename(target)
                if self.links == "hard":
                    os.link(target, path)
                else:
                    path.symlink_to(target if self.links == "outside" else os.path.relpath(target, path.parent))


def flags_of(data: Data) -> list[bool]:
    """Whether the model is right on each held-out image, by the name of its file."""
    images = data.held_out.images
    assert isinstance(images, FolderImages)
    return [images.paths[index].name[0] == images.paths[index].name[1] for index in data.held_out.order]


def require_disjoint(data: Data) -> None:
    """Asserts that no held-out image is one to calibrate, validate or train on, and that junk is in none of them."""
    sets = []
    for split in (data.held_out, data.calibration, data.validation, data.training):
        assert isinstance(split.images, FolderImages)
        sets.append({os.path.realpath(split.images.paths[index]) for index in split.order})
        assert not any("junk" in path for path in sets[-1])
    assert not sets[0] & sets[1].union(sets[2], sets[3])


folders = st.builds(
    Folders,
    naming=st.sampled_from(NAMINGS),
    splits=st.sampled_from(SPLITS),
    wrapper=st.sampled_from(WRAPPERS),
    inner=st.sampled_from(INNER),
    junk=st.lists(st.sampled_from(JUNK), max_size=2, unique=True).map(tuple),
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=3).map(tuple),
    classes=st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True).map(tuple) | st.just((0, 1, 2, 3)),
    links=st.sampled_from([None, None, *LINKS]),
    class_file=st.sampled_from([None, None, "classes.txt", "class_to_idx.json"]),
    wrong=st.sampled_from([0.0, 0.2, 0.5]),
    seed=st.integers(0, 1000),
)


@share(60, 3000)
@given(folders, st.sampled_from([LABELS, LABELS, ()]), st.integers(0, 3))
def test_accuracy_of_folders(
    tmp_path_factory: pytest.TempPathFactory, layout: Folders, labels: tuple[str, ...], seed: int
) -> None:
    root = tmp_path_factory.getbasetemp() / "fuzz-accuracy"
    shutil.rmtree(root, ignore_errors=True)
    layout.write(root)
    dense, choice = model(labels), DataChoice(calibration=8, validation=4, seed=seed)

    def read() -> tuple[Data, Comparison, tuple[str, ...]]:
        data = data_for(root, dense, choice)
        return data, *reported(dense, data)

    found: Any = answer(read)
    numbered = "{index}" in layout.naming and len(layout.classes) > 1  # one numbered folder may wrap a data set
    named = layout.class_file is not None or (labels and "{index}" not in layout.naming) or numbered
    if isinstance(found, MpcompileError):
        readable = "which value is white" in str(found) or "and the other images from 0 to" in str(found)
        assert readable or not named, found
        return
    data, comparison, notes = found
    require_disjoint(data)
    flags = flags_of(data)
    excuses = () if named and "{index}" not in layout.naming else ASSUMED
    require_right(comparison, notes, sum(flags) / len(flags), excuses)
    assert comparison.dense is not None or not named, notes
