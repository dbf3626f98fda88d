"""TensorFlow Datasets, by a stand-in of the functions that are called: the package is large, and not installed."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from dataset_files import encoded

from mpcompile.data.dataset_images import load_dataset_images
from mpcompile.data.dataset_name import dataset_named
from mpcompile.data.divide import Numbers
from mpcompile.data.images import Data
from mpcompile.errors import LoadError
from mpcompile.testing import tiny_source


class Image:
    """The type of an image column."""


class ClassLabel:
    """The type of a class column."""

    names = ("zebra", "ant", "cow")


class Stream:
    """A tf.data.Dataset of rows that counts how many are read."""

    def __init__(self, count: int) -> None:
        self.count, self.read, self.seed, self.deterministic = count, 0, -1, False

    def shuffle(self, window: int, seed: int) -> "Stream":
        self.seed = seed
        return self

    def with_options(self, options: Any) -> "Stream":
        self.deterministic = options.deterministic
        return self

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in range(self.count):
            self.read += 1
            yield {"image": encoded(number), "label": np.int64(number % 3), "id": b"x"}


class Builder:
    """A prepared dataset of two splits."""

    data_dir = "/data/tfds/animals/1.0.0"

    def __init__(self, prepared: bool) -> None:
        self.prepared = prepared
        self.info = SimpleNamespace(
            splits={"train": 1000, "test": 50}, features={"image": Image(), "label": ClassLabel(), "id": object()}
        )
        self.streams: dict[str, Stream] = {}
        self.asked: dict[str, Any] = {}

    def is_prepared(self) -> bool:
        return self.prepared

    def as_dataset(self, split: str, **asked: Any) -> Stream:
        self.asked = asked
        return self.streams.setdefault(split, Stream(self.info.splits[split]))


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Builder:
    """The builder that the stand-in of tensorflow_datasets gives for any name."""
    found = Builder(prepared=True)
    library: Any = ModuleType("tensorflow_datasets")
    library.builder = lambda name: found
    library.builder_from_directory = lambda path: found
    library.decode = SimpleNamespace(SkipDecoding=lambda: "encoded")
    library.ReadConfig = dict
    library.as_numpy = lambda stream: stream
    tensorflow: Any = ModuleType("tensorflow")
    tensorflow.config = SimpleNamespace(set_visible_devices=lambda devices, kind: None)
    tensorflow.data = SimpleNamespace(Options=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", library)
    monkeypatch.setitem(sys.modules, "tensorflow", tensorflow)
    return found


def read(text: str) -> Data:
    dataset = dataset_named(text)
    assert dataset is not None
    return load_dataset_images(dataset, tiny_source(), 3, Numbers(8, 4, 6, 7))


def test_a_stream_of_encoded_images_is_read_as_far_as_it_is_needed(builder: Builder) -> None:
    data = read("tfds/animals")
    assert {split: stream.read for split, stream in builder.streams.items()} == {"train": 12, "test": 6}
    assert all(stream.seed == 7 and stream.deterministic for stream in builder.streams.values())
    assert builder.asked == {
        "shuffle_files": True, "decoders": {"image": "encoded"}, "read_config": {"shuffle_seed": 7}
    }  # fmt: skip
    assert [len(split) for split in (data.calibration, data.validation, data.held_out)] == [8, 4, 6]
    assert data.held_out.labelled
    [(_, labels)] = data.held_out.batches()
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert "split test of tfds/animals (6 images of a stream" in data.notes[0]


def test_what_is_not_prepared_is_not_downloaded(builder: Builder, tmp_path: Path) -> None:
    builder.prepared = False
    with pytest.raises(LoadError, match=r"tfds/animals is not prepared in .*1.0.0; run tfds build animals"):
        read("tfds/animals")
    builder.prepared = True
    assert len(read(f"tfds/{tmp_path}").held_out) == 6
