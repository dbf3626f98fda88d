"""Data that a function of the user gives: every form of iterable, lazily where it has an index, and what is refused."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import mpcompile.data.samples as samples_module
from mpcompile.data.given import given_data
from mpcompile.data.images import Data
from mpcompile.errors import LoadError
from mpcompile.testing import tiny_source

SIZE = tiny_source().size
IMAGES = torch.randn(40, *SIZE, generator=torch.Generator().manual_seed(0))
MAPS = torch.arange(40 * 4).reshape(40, 2, 2)
PAIRS = [(IMAGES[i], MAPS[i]) for i in range(40)]


def read(given: Any, names: tuple[str, ...] = ("images",), **more: Any) -> Data:
    return given_data(given, tiny_source(), names, name="own:data", **more)


def pixels(data: Data) -> Tensor:
    """All images of the calibration, validation and held-out splits, in the order of the set."""
    splits = (data.calibration, data.validation, data.held_out)
    rows = [(index, split.images[index][0]) for split in splits for index in split.order]
    return torch.stack([row for _, row in sorted(rows, key=lambda row: row[0])])


class Counted(Dataset[Any]):
    """A dataset with an index that counts how often each sample is read."""

    def __init__(self) -> None:
        self.reads: list[int] = []

    def __len__(self) -> int:
        return len(PAIRS)

    def __getitem__(self, index: int) -> Any:
        self.reads.append(index)
        return PAIRS[index]


def one_by_one() -> Iterator[Any]:
    yield from PAIRS


@pytest.mark.parametrize(
    "given",
    [
        PAIRS,
        tuple(PAIRS),
        one_by_one,
        one_by_one(),
        TensorDataset(IMAGES, MAPS),
        DataLoader(TensorDataset(IMAGES, MAPS), batch_size=7),
        [(IMAGES[:30], MAPS[:30]), (IMAGES[30:], MAPS[30:])],
        [{"image": image.numpy(), "label": target} for image, target in PAIRS],
        DataLoader([{"pixel_values": image, "labels": target} for image, target in PAIRS], batch_size=3),  # type: ignore[arg-type]
    ],
    ids=["list", "tuple", "function", "generator", "dataset", "loader", "batches", "dicts", "dict-loader"],
)
def test_every_form_gives_the_same_samples(given: Any) -> None:
    data = read(given)
    assert torch.equal(pixels(data), IMAGES)
    assert not data.held_out.labelled
    [targets] = list(data.held_out.targets())
    assert torch.equal(torch.stack(targets), MAPS[list(data.held_out.order)])
    assert not set(data.held_out.order) & {*data.calibration.order, *data.validation.order}


def test_samples_with_an_index_are_read_when_they_are_needed() -> None:
    given = Counted()
    data = read(given)
    assert set(given.reads) <= {0}  # its form
    given.reads.clear()
    for _, targets in zip(data.held_out.batches(4), data.held_out.targets(4), strict=True):
        assert len(targets) <= 4
    assert given.reads == list(data.held_out.order)  # once each, for image and target


def test_classes_are_labels_and_pictures_are_preprocessed() -> None:
    pictures = [PIL.Image.fromarray(np.full((20, 20), 10 * i, np.uint8)) for i in range(12)]
    data = read([{"image": one, "label": i % 3} for i, one in enumerate(pictures)])
    assert data.held_out.labelled
    for images, labels in data.held_out.batches():
        assert tuple(images.shape[1:]) == SIZE
        assert labels.tolist() == [index % 3 for index in data.held_out.order]


def test_splits_by_name_and_several_inputs() -> None:
    both = [({"pixel_values": image, "box": torch.ones(4)}, target) for image, target in PAIRS]
    data = read(
        {"train": both[:30], "validation": both[30:35], "test": both[35:]}, ("pixel_values", "box"), calibration=8
    )
    assert [len(split.order) for split in (data.calibration, data.validation, data.held_out)] == [8, 5, 5]
    images, boxes = data.held_out.first_inputs(5)
    assert torch.equal(images, IMAGES[35:])
    assert boxes.shape == (5, 4)
    only = read({"train": PAIRS[:30], "val": PAIRS[30:]}, calibration=8)
    assert [len(split.order) for split in (only.calibration, only.held_out)] == [8, 10]
    assert not set(only.calibration.order) & set(only.validation.order)
    loader: Any = DataLoader(both, batch_size=4)  # type: ignore[arg-type]
    assert torch.equal(read(loader, ("pixel_values", "box")).held_out.first_inputs(1)[1], torch.ones(1, 4))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (3, "own:data returned a int; it must return an iterable"),
        ([], "own:data has no samples; give at least one"),
        ([1, 2], "sample 0 is a int; give \\(inputs, target\\), or a dict with image and label"),
        ([{"x": 1}], "sample 0 is a dict with x; give"),
        ([("a", 1)] * 9, "sample . has a str as its image"),
        ([(IMAGES[0].byte(), 1)] * 9, "is uint8; give preprocessed floating-point tensors"),
        ([(IMAGES[0][:, :3], 1)] * 9, r"has shape \(1, 3, 8\); the model takes \(1, 8, 8\)"),
        ({"train": PAIRS}, "own:data has the splits train; give train"),
        ({"train": PAIRS, "test": PAIRS, "x": PAIRS}, "the splits train, test, x"),
    ],
)
def test_what_is_refused(given: Any, text: str) -> None:
    with pytest.raises(LoadError, match=text):
        list(read(given).held_out.batches())


def test_an_iterable_that_does_not_fit_into_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples_module, "available_bytes", lambda: 4000)
    with pytest.raises(LoadError, match=r"without an index, of which 4 samples take .*; return a sequence"):
        read(one_by_one)
    assert len(read(PAIRS).held_out) > 0  # has an index: nothing is kept


class Endless(IterableDataset[Any]):
    """A stream without an end that counts its samples."""

    read = 0

    def __iter__(self) -> Iterator[Any]:
        while True:
            self.read += 1
            yield PAIRS[self.read % 40]


@pytest.mark.parametrize("batch", [None, 8])
def test_a_stream_is_read_until_it_has_given_enough(batch: int | None) -> None:
    stream = Endless()
    given: Any = stream if batch is None else DataLoader(stream, batch_size=batch)
    data = read(given, calibration=8, validation=4, held_out=10)
    assert stream.read <= 22 + (batch or 0)
    assert [len(split) for split in (data.calibration, data.validation, data.held_out)] == [8, 2, 10]
    assert data.notes[1] == "only the first 22 samples of own:data were read, in their order"


def test_streams_by_split() -> None:
    parts = {"train": Endless(), "test": lambda: Endless()}
    data = read(parts, calibration=8, validation=4, held_out=10)
    assert [len(split) for split in (data.calibration, data.validation, data.held_out)] == [8, 4, 10]
    assert [note.split(" were read ")[1] for note in data.notes[1:]] == [
        "for train, in their order", "for held_out, in their order"
    ]  # fmt: skip


def test_the_note_says_what_was_drawn() -> None:
    assert read(PAIRS, calibration=8, validation=4, held_out=10, seed=3).notes == (
        "the images are those of own:data: 8 for calibration and 4 for validation, drawn by seed 3 from 40 samples, "
        "and 10 held out of 40",
    )
