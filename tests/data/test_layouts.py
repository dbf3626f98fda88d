"""Layouts of image folders: splits in any spelling, nested folders, hidden and system files, flat folders."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from mpcompile.data.folder import FolderImages
from mpcompile.data.images import Data, Split
from mpcompile.data.loading import load_data
from mpcompile.data.split_folders import split_of
from mpcompile.errors import LoadError
from mpcompile.ir.source import Source

SOURCE = Source(name="m", sha256="", arch="m", size=(1, 8, 8), mean=(0.5,), std=(0.5,), crop_pct=1.0)


def save(root: Path, *folders: str, each: int = 4) -> Path:
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            Image.new("L", (8, 8), number).save(root / folder / f"{number}.png")
    return root


def folders(split: Split, root: Path) -> set[str]:
    """The folders, relative to the root, of the images of a split."""
    assert isinstance(split.images, FolderImages)
    return {split.images.paths[index].parent.relative_to(root).as_posix() for index in split.order}


def labels(data: Data, root: Path) -> Mapping[str, int]:
    images = data.held_out.images
    assert isinstance(images, FolderImages)
    return {
        path.parent.relative_to(root).as_posix(): label for path, label in zip(images.paths, images.labels, strict=True)
    }


@pytest.mark.parametrize(
    "hidden",
    [".ipynb_checkpoints", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", ".git/a/b"],
)
def test_hidden_and_system_folders_are_no_classes(tmp_path: Path, hidden: str) -> None:
    save(tmp_path, "cat", "dog", hidden)
    Image.new("L", (8, 8)).save(tmp_path / "cat" / "._0.png")
    (tmp_path / "cat" / "Thumbs.db").write_bytes(b"x")
    data = load_data(tmp_path, SOURCE, 2, calibration=2)
    assert labels(data, tmp_path) == {"cat": 0, "dog": 1}
    assert len(data.held_out.images) == 8
    [note] = [note for note in data.notes if "hidden and system files and folders" in note]
    assert hidden.split("/")[0] in note
    assert not any("suffix" in note for note in data.notes)


@pytest.mark.parametrize(
    ("train", "held_out"),
    [("train", "val"), ("Train", "Val"), ("training", "validation"), ("TRAIN", "Test"), ("train2017", "val2017"),
     ("Training Set", "test_set"), ("train_images", "valid"), ("trainset", "Testing")],
)  # fmt: skip
def test_splits_are_known_in_any_case_and_spelling(tmp_path: Path, train: str, held_out: str) -> None:
    save(tmp_path, *(f"{split}/{name}" for split in (train, held_out) for name in ("cat", "dog")))
    data = load_data(tmp_path, SOURCE, 2)
    assert folders(data.calibration, tmp_path) == {f"{train}/cat", f"{train}/dog"}
    assert folders(data.held_out, tmp_path) == {f"{held_out}/cat", f"{held_out}/dog"}
    assert data.held_out.labelled


@pytest.mark.parametrize("name", ["trainer", "validity", "testbed", "cat", "tests", "retrain", "tram"])
def test_other_names_are_no_splits(name: str) -> None:
    assert split_of(name) is None


def test_two_folders_for_one_split_are_refused(tmp_path: Path) -> None:
    save(tmp_path, "train/cat", "training/cat", "val/cat")
    with pytest.raises(LoadError, match="has train/ and training/, which mean one split; keep one"):
        load_data(tmp_path, SOURCE, 1)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    save(tmp_path, "bus", "train", "tram")
    data = load_data(tmp_path, SOURCE, 3, calibration=2)
    assert labels(data, tmp_path) == {"bus": 0, "train": 1, "tram": 2}


def test_only_a_held_out_folder_is_divided_and_said(tmp_path: Path) -> None:
    save(tmp_path, "val/cat", "val/dog")
    data = load_data(tmp_path, SOURCE, 2, calibration=2)
    assert labels(data, tmp_path) == {"val/cat": 0, "val/dog": 1}
    assert any("there is only val/" in note for note in data.notes)


def test_val_and_test_without_train_are_kept_apart(tmp_path: Path) -> None:
    save(tmp_path, "Val/cat", "Val/dog", "Test/cat", "Test/dog")
    data = load_data(tmp_path, SOURCE, 2)
    assert folders(data.calibration, tmp_path) == {"Val/cat", "Val/dog"}
    assert folders(data.held_out, tmp_path) == {"Test/cat", "Test/dog"}
    assert any("there is no train/: calibration images are from Val/" in note for note in data.notes)


def test_a_third_split_is_not_used(tmp_path: Path) -> None:
    save(tmp_path, "train/cat", "val/cat", "test/cat")
    data = load_data(tmp_path, SOURCE, 1)
    assert folders(data.held_out, tmp_path) == {"val/cat"}
    assert "test/ beside the splits was not used" in data.notes


def test_splits_inside_classes_are_refused(tmp_path: Path) -> None:
    save(tmp_path, "cat/train", "cat/test", "dog/train", "dog/test")
    with pytest.raises(LoadError, match="has splits inside its class folders"):
        load_data(tmp_path, SOURCE, 2)


def test_the_top_level_is_the_class(tmp_path: Path) -> None:
    save(tmp_path, "cat/images", "dog/images", "dog/more/deep")
    data = load_data(tmp_path, SOURCE, 2, calibration=2)
    assert labels(data, tmp_path) == {"cat/images": 0, "dog/images": 1, "dog/more/deep": 1}


def test_the_innermost_folders_are_classes_if_only_they_fit(tmp_path: Path) -> None:
    save(tmp_path, "animals/cat", "animals/dog", "vehicles/car")
    data = load_data(tmp_path, SOURCE, 3, calibration=2)
    assert labels(data, tmp_path) == {"animals/cat": 1, "animals/dog": 2, "vehicles/car": 0}
    assert "the innermost folders (car, cat, dog) are taken as classes, not those at the top" in data.notes


@pytest.mark.parametrize("wrapper", ["archive", "archive/data", "ILSVRC/Data/CLS-LOC"])
def test_folders_that_only_wrap_the_data_set_are_passed(tmp_path: Path, wrapper: str) -> None:
    save(tmp_path, f"{wrapper}/train/cat", f"{wrapper}/train/dog", f"{wrapper}/val/cat", f"{wrapper}/val/dog")
    data = load_data(tmp_path, SOURCE, 2)
    assert folders(data.held_out, tmp_path) == {f"{wrapper}/val/cat", f"{wrapper}/val/dog"}


def test_a_single_class_is_no_wrapper(tmp_path: Path) -> None:
    data = load_data(save(tmp_path, "class_3/images"), SOURCE, 5, calibration=2)
    assert labels(data, tmp_path) == {"class_3/images": 3}


def test_stray_images_are_no_class(tmp_path: Path) -> None:
    save(tmp_path, "cat", "dog")
    Image.new("L", (8, 8)).save(tmp_path / "preview.png")
    data = load_data(tmp_path, SOURCE, 2, calibration=2)
    assert labels(data, tmp_path) == {"cat": 0, "dog": 1}
    assert any("1 images beside the class folders of" in note for note in data.notes)
    save(tmp_path, ".", each=20)
    with pytest.raises(LoadError, match=r"has 21 images beside folders with 8 \(cat, dog\)"):
        load_data(tmp_path, SOURCE, 2, calibration=2)


def test_a_flat_folder_is_divided_and_said(tmp_path: Path) -> None:
    save(tmp_path, ".", each=60)
    data = load_data(tmp_path, SOURCE, 2)
    assert [len(split) for split in (data.calibration, data.validation, data.held_out)] == [30, 6, 24]
    assert not set(data.calibration.order) & {*data.held_out.order, *data.validation.order}
    assert data.notes == (
        "the images have no labels: the outputs are compared with the dense model's, and accuracy is not measured",
        "there are 60 images, and 256 were asked for calibration: half of them calibrate, and the others are held out",
    )


def test_links_to_each_other_are_refused(tmp_path: Path) -> None:
    save(tmp_path, "cat", "dog")
    (tmp_path / "cat" / "x").symlink_to(tmp_path / "dog")
    (tmp_path / "dog" / "y").symlink_to(tmp_path / "cat")
    with pytest.raises(LoadError, match="contains a link to a folder above it"):
        load_data(tmp_path, SOURCE, 2)


@pytest.mark.parametrize("wrapper", ["", "archive/", "archive/val/"])
@pytest.mark.parametrize("class_file", [True, False])
def test_one_class_with_subfolders_is_no_wrapper(tmp_path: Path, wrapper: str, class_file: bool) -> None:
    """`dog/00` and `dog/01` were taken for classes 0 and 1 although dog is class 3."""
    save(tmp_path, f"{wrapper}dog/00", f"{wrapper}dog/01")
    names = ("cow", "bee", "ant", "dog")
    if class_file:
        place = tmp_path / wrapper.removesuffix("val/")
        (place / "classes.txt").write_text("\n".join(names))
    source = SOURCE if class_file else replace(SOURCE, labels=names)
    assert set(labels(load_data(tmp_path, source, 4, calibration=2), tmp_path).values()) == {3}
