"""Datasets of Hugging Face on disk: by index and as a stream, without the network, and what is refused."""

import builtins
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dataset_files import encoded, picture

from mpcompile.data.dataset_images import load_dataset_images
from mpcompile.data.dataset_name import dataset_named
from mpcompile.data.divide import Numbers
from mpcompile.data.encoded_images import DatasetImages
from mpcompile.data.images import Data, Split
from mpcompile.errors import LoadError, MpcompileError, RuntimeMissing, UsageError
from mpcompile.pipeline.fingerprint import images_key
from mpcompile.testing import tiny_source

CLASSES = ("shirt", "bag", "boot", "coat", "dress")
FEW = Numbers(8, 4, None, 0)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The package datasets, with its cache in a folder of the test, and without the network."""
    found = pytest.importorskip("datasets", reason="datasets is not installed: pip install 'mpcompile[hfds]'")
    found.disable_progress_bars()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(found.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(socket.socket, "connect", _no_network)
        patch.setattr(socket, "getaddrinfo", _no_network)
        yield found


def _no_network(*_: object, **__: object) -> None:
    raise AssertionError("the network was used")


def rows(library: Any, count: int, names: tuple[str, ...] | None = CLASSES) -> Any:
    features = library.Features(
        {"image": library.Image(), "label": library.ClassLabel(names=list(names)) if names else library.Value("int64")}
    )
    images = [{"bytes": encoded(number), "path": None} for number in range(count)]
    return library.Dataset.from_dict(
        {"image": images, "label": [number % len(CLASSES) for number in range(count)]}, features=features
    )


@pytest.fixture(scope="module")
def saved(library: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of three splits that `save_to_disk` wrote."""
    folder = tmp_path_factory.mktemp("saved")
    parts = {"train": rows(library, 60), "validation": rows(library, 20), "test": rows(library, 10)}
    library.DatasetDict(parts).save_to_disk(folder)
    return folder


@pytest.fixture(scope="module")
def folder(library: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Image files in class folders of two splits, as `imagefolder` reads them."""
    root = tmp_path_factory.mktemp("folder")
    for split, count in (("train", 40), ("test", 10)):
        for number in range(count):
            path = root / split / CLASSES[number % 5] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(number))
    return root


def read(text: str, *, outputs: int = 5, numbers: Numbers = FEW, skip_broken: bool = False) -> Data:
    dataset = dataset_named(text)
    assert dataset is not None
    return load_dataset_images(dataset, tiny_source(), outputs, numbers, skip_broken=skip_broken)


def names(split: Split) -> list[str]:
    assert isinstance(split.images, DatasetImages)
    return [str(split.images.paths[index]) for index in split.order]


def test_by_index_nothing_is_decoded_that_is_not_used(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_rows: list[str] = []
    open_row = DatasetImages.picture

    def counted(images: DatasetImages, index: int) -> Any:
        read_rows.append(str(images.paths[index]))
        return open_row(images, index)

    monkeypatch.setattr(DatasetImages, "picture", counted)
    data = read(f"hfds/{saved}", numbers=Numbers(8, 4, 6, 0))
    assert read_rows == []
    data.calibration.first(3)
    assert read_rows == names(data.calibration)[:3]
    assert [len(split) for split in (data.calibration, data.validation, data.held_out)] == [8, 4, 6]
    assert len(data.training) == 60 - 4
    assert all(f"of split validation of hfds/{saved}" in name for name in names(data.held_out))
    assert data.notes[0] == (
        f"8 calibration and 4 validation images were drawn by seed 0 from split train of hfds/{saved} (60 images), and "
        f"6 held-out images from split validation of hfds/{saved} (20 images)"
    )
    assert names(read(f"hfds/{saved}", numbers=Numbers(8, 4, 6, 0)).calibration) == names(data.calibration)
    assert names(read(f"hfds/{saved}", numbers=Numbers(8, 4, 6, 1)).calibration) != names(data.calibration)


@pytest.mark.parametrize("kind", ["hfds", "hfids"])
def test_images_and_classes_are_those_of_the_rows(folder: Path, kind: str) -> None:
    data = read(f"{kind}/{folder}")
    ordered = sorted(CLASSES)  # imagefolder's order, which is that of the dataset's classes
    assert data.held_out.labelled
    assert any(f"the dataset's classes in their order ({ordered[0]}" in note for note in data.notes)
    images = data.calibration.images
    assert isinstance(images, DatasetImages)
    for index in data.calibration.order:
        shade = images.picture(index)[0].getpixel((0, 0))
        pixels, label = images[index]
        assert pixels.equal(images.transform(picture(shade).convert("L")))
        assert ordered[label] == CLASSES[shade % 5]


def test_a_stream_is_read_as_far_as_it_is_needed(folder: Path) -> None:
    data = read(f"hfids/{folder}", numbers=Numbers(8, 4, 6, 0))
    assert "(12 images of a stream, shuffled in a window of 1,000)" in data.notes[0]
    assert isinstance(data.calibration.images, DatasetImages)
    assert len(data.calibration.images) == 12
    again = read(f"hfids/{folder}", numbers=Numbers(8, 4, 6, 0))
    assert images_key(again.calibration) == images_key(data.calibration)
    assert images_key(read(f"hfids/{folder}", numbers=Numbers(8, 4, 6, 1)).calibration) != images_key(data.calibration)


def test_a_stream_is_kept_in_a_part_of_the_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpcompile.data.dataset_pool.unused_bytes", lambda device: 1000)
    with pytest.raises(LoadError, match=r"the first \d+ of 12 images take .* of memory, and 250 bytes are allowed"):
        read(f"hfids/{folder}")
    assert len(read(f"hfds/{folder}").held_out) == 10


def test_the_fingerprint_of_a_dataset_follows_its_rows(library: Any, saved: Path, tmp_path: Path) -> None:
    first, again = read(f"hfds/{saved}"), read(f"hfds/{saved}")
    assert images_key(first.training) == images_key(again.training)
    library.DatasetDict({"train": rows(library, 59), "validation": rows(library, 20)}).save_to_disk(tmp_path)
    assert images_key(read(f"hfds/{tmp_path}").training) != images_key(first.training)


def test_columns_that_are_named(library: Any, tmp_path: Path) -> None:
    both = rows(library, 30).add_column("fine", [number % 3 for number in range(30)])
    both = both.cast_column("fine", library.ClassLabel(names=["a", "b", "c"])).rename_column("label", "coarse")
    both.save_to_disk(tmp_path)
    with pytest.raises(LoadError, match=r"has the columns image, coarse, fine, of which coarse, fine may be the label"):
        read(f"hfds/{tmp_path}")
    assert read(f"hfds/{tmp_path},label=fine", outputs=3).held_out.labelled
    data = read(f"hfds/{tmp_path},label=image")
    assert not data.held_out.labelled
    assert any("the images have no label that is one class" in note for note in data.notes)
    with pytest.raises(LoadError, match="has no column 'x'; it has image, coarse, fine"):
        read(f"hfds/{tmp_path},image=x")
    with pytest.raises(LoadError, match="image . of .* has no encoded image; choose the column with ,image=COLUMN"):
        read(f"hfds/{tmp_path},image=fine,label=coarse", numbers=Numbers(1, 0, 29, 0)).held_out.first(1)
    both.remove_columns(["image"]).save_to_disk(tmp_path / "none")
    with pytest.raises(LoadError, match="has the columns coarse, fine, and none is of images; give ,image=COLUMN"):
        read(f"hfds/{tmp_path}/none")


def test_class_indices_without_names(library: Any, tmp_path: Path) -> None:
    rows(library, 30, None).save_to_disk(tmp_path)
    data = read(f"hfds/{tmp_path}")
    assert data.held_out.labelled
    assert any("the numbers of the classes (0, 1, 2 and 2 more) are taken as indices" in note for note in data.notes)
    data = read(f"hfds/{tmp_path}", outputs=3)
    assert not data.held_out.labelled
    assert any("accuracy is not measured" in note for note in data.notes)


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("hfds/{}/none", LoadError, "/none does not exist; hfds/ takes a folder, or a name on Hugging Face's hub"),
        ("hfids/{}", UsageError, "was written by save_to_disk; give hfds/.* without a config"),
        ("hfds/{},config=x", UsageError, "was written by save_to_disk; give hfds/.* without a config"),
        ("hfds/{},train=x", LoadError, "has no split 'x'; it has train, validation, test"),
        ("hfds/nobody/nothing", LoadError, r"hfds/nobody/nothing cannot be loaded: .*It is no folder here, so it was"),
    ],
)
def test_what_is_refused(saved: Path, text: str, error: type[MpcompileError], match: str) -> None:
    with pytest.raises(error, match=match):
        read(text.format(saved))
    with pytest.raises(UsageError, match="--skip-broken would decode every image of hfds/"):
        read(f"hfds/{saved}", skip_broken=True)


def test_a_version_that_runs_scripts_is_refused(library: Any, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "__version__", "3.6.0")
    with pytest.raises(RuntimeMissing, match=r"datasets 3.6.0 can run code of a dataset; pip install 'datasets>=4'"):
        read(f"hfds/{saved}")


@pytest.mark.parametrize(
    ("text", "missing", "line"),
    [
        ("hfds/x", "datasets", "datasets is not installed: pip install 'mpcompile[hfds]'"),
        ("HFIDS/x", "datasets", "datasets is not installed: pip install 'mpcompile[hfds]'"),
        ("tfds/x", "tensorflow_datasets", "tensorflow-datasets is not installed: pip install 'mpcompile[tfds]'"),
    ],
)
def test_a_missing_package_is_one_line(text: str, missing: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == missing:
            raise ImportError(name)
        return imported(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RuntimeMissing) as raised:
        read(text)
    assert str(raised.value) == line
    assert raised.value.exit_code == 7
