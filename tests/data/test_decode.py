"""Calibration and validation images are decoded once a run, within a memory limit, and give the same results."""

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import mpcompile
from mpcompile.data import decode
from mpcompile.data.decode import MOST_BYTES, decode_once, kept_limit
from mpcompile.data.folder import FolderImages
from mpcompile.data.images import Data, Split
from mpcompile.data.npz import ArrayImages
from mpcompile.driver.weight_files import MASKS, WEIGHTS
from mpcompile.errors import LoadError
from mpcompile.ir.source import Source
from mpcompile.recipe.schema import Recipe
from mpcompile.testing import TinyCNN

IMAGE_BYTES = 4 * 8 * 8  # one float32 image of the tiny models
RECIPE = """
passes: [mp-budget: {"null": false}, permute, nm-mask, restore: {max_shift: 0.5}, batch-norm, certify]
data: {calibration: 12, validation: 6}
target: eager
bench: {batches: [1], seconds: 0.02}
"""


class Net(TinyCNN):
    """A tiny model as a user has it, with its preprocessing."""

    pretrained_cfg = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,)}  # noqa: RUF012


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 48 images of noise in two classes."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for number in range(24):
            Image.fromarray(rng.integers(0, 256, (10, 10), np.uint8)).save(root / name / f"{number}.png")
    return root


@dataclass(frozen=True)
class Counted:
    """Images of noise that count how often each is read."""

    reads: Counter[int] = field(default_factory=Counter, compare=False)
    bad: int | None = None
    classes: int = 10

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.reads[index] += 1
        if index == self.bad:
            raise LoadError(f"{index}.png is not an image that can be read")
        return torch.randn((1, 8, 8), generator=torch.Generator().manual_seed(index)), index


def data_of(images: Counted) -> Data:
    """Four images to calibrate on, and four others to validate on."""
    return Data(Split(images, (3, 1, 2, 0), labelled=True), validation=Split(images, (4, 5, 6, 7), labelled=True))


@pytest.mark.parametrize("limit_images", [0, 3, 4, 6, 8])
def test_images_within_the_limit_are_read_once(limit_images: int) -> None:
    images, plain = Counted(), data_of(Counted())
    data = decode_once(data_of(images), limit_images * IMAGE_BYTES)
    for _ in range(2):
        for split, expected in ((data.calibration, plain.calibration), (data.validation, plain.validation)):
            for found, wanted in zip(split.batches(3), expected.batches(3), strict=True):
                assert torch.equal(found[0], wanted[0])
                assert torch.equal(found[1], wanted[1])
            assert torch.equal(split.first(2), expected.first(2))
            assert list(split.hashes()) == list(expected.hashes())
    order = [*data.calibration.order, *data.validation.order]
    assert all(images.reads[index] == 1 for index in order[:limit_images])
    assert all(images.reads[index] > 1 for index in order[limit_images:])
    note = (
        f"{8 - limit_images} of 8 calibration and validation images are decoded again at each use, since decoded "
        f"images may take at most {limit_images * IMAGE_BYTES:,} bytes of memory"
    )
    assert data.notes == ((note,) if limit_images < 8 else ())


def test_kept_images_cannot_be_changed_by_a_reader() -> None:
    data = decode_once(data_of(Counted()), MOST_BYTES)
    before = data.calibration.first(4)
    for pixels, _ in data.calibration.batches(1):
        pixels.zero_()
    data.calibration.first(4).zero_()
    assert torch.equal(data.calibration.first(4), before)


def test_another_order_or_another_set_of_images_is_read_as_such() -> None:
    data = decode_once(data_of(Counted()), MOST_BYTES)
    turned = replace(data.calibration, order=(0, 1))
    assert torch.equal(turned.first(2), Split(Counted(), (0, 1), labelled=True).first(2))
    assert list(turned.hashes()) == [list(data.calibration.hashes())[place] for place in (3, 1)]
    arrays = ArrayImages(np.zeros((4, 8, 8, 1), np.uint8), np.zeros(4, np.int64), 1, torch.zeros(1), torch.ones(1))
    other = replace(data.calibration, images=arrays)
    assert torch.equal(other.first(4), torch.zeros(4, 1, 8, 8))
    assert len(set(other.hashes())) == 1


def test_images_in_memory_are_hashed_and_not_kept_twice() -> None:
    arrays = ArrayImages(np.zeros((4, 8, 8, 1), np.uint8), np.zeros(4, np.int64), 1, torch.zeros(1), torch.ones(1))
    data = decode_once(Data(Split(arrays, (0, 1, 2, 3), labelled=True)), 0)
    assert data.notes == ()
    assert data.calibration.decoded is not None
    assert not data.calibration.decoded.pixels
    assert len(data.calibration.decoded.hashes) == 4


def test_the_first_image_that_cannot_be_read_is_named() -> None:
    with pytest.raises(LoadError, match="^5.png is not an image that can be read$"):
        decode_once(data_of(Counted(bad=5)), 0)


def test_the_limit_follows_from_the_memory_that_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, expected in ((None, 0), (10**9, 0), (3 * 10**9, 10**9 // 6), (10**12, MOST_BYTES)):
        monkeypatch.setattr(decode, "unused_bytes", lambda device, found=available: found)
        assert kept_limit(reserved_bytes=2e9) == expected


def test_a_run_decodes_each_file_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a limit of 5 images the run decodes the others again, says so, and writes the same weights and masks."""
    decoded: Counter[str] = Counter()
    picture = FolderImages.picture

    def counted(self: FolderImages, index: int) -> tuple[object, int]:
        decoded[str(self.paths[index])] += 1
        return picture(self, index)

    monkeypatch.setattr(FolderImages, "picture", counted)
    source = Source(name="m", sha256="", arch="m", size=(1, 8, 8), mean=(0.5,), std=(0.5,))
    data = mpcompile.load_data(folder, source, outputs=10, calibration=12, validation=6)
    files = [str(folder_images(split).paths[i]) for split in (data.calibration, data.validation) for i in split.order]
    times, notes = {}, {}
    for name, limit_images in (("whole", 100), ("limited", 5)):
        monkeypatch.setattr(decode, "MOST_BYTES", limit_images * IMAGE_BYTES)
        decoded.clear()
        torch.manual_seed(0)
        artifact = mpcompile.compile(Net().eval(), Recipe.from_yaml(RECIPE), data=folder, output=tmp_path / name)
        times[name], notes[name] = [decoded[file] for file in files], artifact.report.data.notes
    assert times["whole"] == [1] * 18
    assert times["limited"][:5] == [1] * 5
    assert min(times["limited"][5:]) > 1
    assert not any("decoded again" in note for note in notes["whole"])
    assert "13 of 18 calibration and validation images are decoded again at each use" in notes["limited"][-1]
    assert "13 of 18 calibration" in (tmp_path / "limited" / "report.md").read_text(encoding="utf-8")
    for file in (WEIGHTS, MASKS):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "limited" / file).read_bytes()


def folder_images(split: Split) -> FolderImages:
    """The split's images as files."""
    assert isinstance(split.images, FolderImages)
    return split.images
