"""Folders of images with odd names, modes, layouts and links: right labels and pictures, a note, or an error in words.

The label of each image is known by construction: its grey value is that of its class. No answer without a note may give
another label, or another picture.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import answer, share
from PIL import Image

from mpcompile.data.folder import FolderImages
from mpcompile.data.images import Data
from mpcompile.data.loading import load_data
from mpcompile.errors import LoadError
from mpcompile.ir.source import Source

pytestmark = pytest.mark.filterwarnings("default")  # warnings are errors in the suite, and not where it is used

LABELS = ("ant", "bee", "cow", "dog")
SOURCE = Source(
    name="m", sha256="", arch="m", size=(1, 4, 4), mean=(0.0,), std=(1.0,), crop_pct=1.0, labels=LABELS[::-1]
)
STEP = 60  # grey levels between classes
SPLITS = ("", "train/", "Train/", "val/", "Val/", "VALIDATION/", "test/", "training set/", "unlabelled/")
FOLDERS = (
    *("{name}", "{name}", "{name}", "{upper}", "{name} ", "{name}/images", "{name}/a/b", "group/{name}", "{index}"),
    *("class_{index}", "{name}{index}", "é{name}", ".{name}", "__MACOSX/{name}", "@eaDir", "Thumbs.db", "other"),
    *("{name}\n", "\x1b[0m{name}", "\udcff{name}", "", "{name}/train", "{name}/val", "²{name}", "1²3", "lost+found"),
)
KINDS = ("L", "RGB", "RGBA", "P", "CMYK", "1", "I;16", "I", "F", "LA", "text", "empty")


def written(path: Path, grey: int, kind: str) -> None:
    """An image file of a constant grey; `text` and `empty` are no images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind in ("text", "empty"):
        path.with_suffix(".png").write_bytes(b"hello" if kind == "text" else b"")
        return
    pixels = np.full((4, 4), grey, np.uint8)
    if kind == "I;16":
        image = Image.fromarray(pixels.astype(np.uint16) * 257)
    elif kind == "I":
        image = Image.fromarray(pixels.astype(np.int32) * 257)
    elif kind == "F":
        image = Image.fromarray(pixels.astype(np.float32))
    elif kind == "P":
        image = Image.fromarray(pixels).convert("P")
    else:
        image = Image.fromarray(pixels).convert("RGB").convert(kind)
    image.save(path.with_suffix(".tif" if kind in ("I", "F", "CMYK") else ".png"))


def read(root: Path, options: dict[str, Any]) -> Data:
    data = load_data(root, SOURCE, len(LABELS), calibration=3, **options)
    for split in (data.calibration, data.validation, data.held_out):
        for pixels, labels in split.batches(2):
            assert pixels.isfinite().all()
            assert (pixels >= 0).all()
            assert (pixels <= 1).all()
            assert (labels < len(LABELS)).all()
    return data


@share(80, 4000)
@given(st.data())
def test_layouts(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    root = tmp_path_factory.getbasetemp() / "fuzz-layouts"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for number in range(data.draw(st.integers(0, 10))):
        label = data.draw(st.integers(0, 3))
        name = LABELS[::-1][label]
        folder = data.draw(st.sampled_from(FOLDERS)).format(name=name, upper=name.upper(), index=label)
        kind = data.draw(st.sampled_from(KINDS)) if data.draw(st.booleans()) else "L"
        try:
            written(root / data.draw(st.sampled_from(SPLITS)) / folder / str(number), STEP * label, kind)
        except OSError:  # the place is taken by a file or folder of this name
            continue
    for _ in range(data.draw(st.integers(0, 1))):
        target = data.draw(st.sampled_from([".", "..", "ant", "nowhere", "train"]))
        (root / data.draw(st.sampled_from(["zebra", "train", "zz.png"]))).joinpath().with_name("link").symlink_to(
            target
        )
    if data.draw(st.booleans()):
        text = data.draw(st.sampled_from(["ant\nbee\ncow\ndog\n", "", "\0", "[", '{"ant": 9}', "dog\ncow\nbee\nant"]))
        (root / data.draw(st.sampled_from(["classes.txt", "class_to_idx.json"]))).write_text(text)
    options = {
        "exif": data.draw(st.sampled_from(["apply", "ignore"])),
        "alpha": data.draw(st.sampled_from(["drop", "white"])),
        "skip_broken": data.draw(st.booleans()),
    }
    found = answer(lambda: read(root, options))
    if isinstance(found, Data):
        assert all(note.isprintable() and note.encode() for note in found.notes)


@share(60, 3000)
@given(st.data())
def test_labels_are_right_or_assumed_with_a_note(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Class folders by any way of naming: each image has the label of its grey, unless a note says what was assumed."""
    root = tmp_path_factory.getbasetemp() / "fuzz-labels"
    shutil.rmtree(root, ignore_errors=True)
    naming = data.draw(st.sampled_from(["{name}", "{upper}", "{name}_", "{index}", "class-{index}", "label {index}"]))
    inner = data.draw(st.sampled_from(["", "/images", "/a/b"]))
    wrapper = data.draw(st.sampled_from(["", "archive/", "data/set/"]))
    splits = data.draw(
        st.sampled_from([("",), ("Train/", "Val/"), ("training/", "TEST/"), ("val/", "test/"), ("val/",)])
    )
    kind = data.draw(st.sampled_from([kind for kind in KINDS if kind not in ("1", "text", "empty")]))
    chosen = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True))
    junk = data.draw(st.lists(st.sampled_from([".git", "__MACOSX", "@eaDir", "$RECYCLE.BIN", ".ipynb_checkpoints"])))
    for split in splits:
        for label in chosen:
            name = LABELS[::-1][label]
            folder = naming.format(name=name, upper=name.upper(), index=label)
            for number in range(6):
                written(root / f"{wrapper}{split}{folder}{inner}" / str(number), STEP * label, kind)
        for name in junk:
            written(root / f"{wrapper}{split}{name}" / "9", 7, "L")
    found = answer(lambda: read(root, {}))
    if kind in ("I;16", "I") and isinstance(found, LoadError) and "which value is white" in str(found):
        return  # no picture is bright
    assert isinstance(found, Data), found
    assumed = any("assumed" in note or "taken as indices" in note for note in found.notes)
    for part in (found.calibration, found.validation, found.held_out):
        for pixels, labels in part.batches(64):
            expected = (pixels.amax((1, 2, 3)) * 255 / STEP).round().long()
            assert (pixels.amax((1, 2, 3)) * 255 - STEP * expected).abs().max() < 0.01
            assert part.labelled
            assert (labels == expected).all() or assumed
    calibration, held_out = found.calibration, found.held_out
    assert isinstance(calibration.images, FolderImages)
    assert isinstance(held_out.images, FolderImages)
    paths = {calibration.images.paths[index] for index in calibration.order}
    assert not paths & {held_out.images.paths[index] for index in held_out.order}
