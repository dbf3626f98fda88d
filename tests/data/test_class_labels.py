"""Class folders are matched to the outputs of a model by name, and refused or noted where they cannot be."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from mpcompile.data.class_file import read_class_file
from mpcompile.data.class_names import ClassMatch, ClassTable, match_classes
from mpcompile.data.folder import FolderImages
from mpcompile.data.images import Data
from mpcompile.data.loading import load_data
from mpcompile.errors import LoadError, UsageError
from mpcompile.ir.source import Source

SOURCE = Source(name="m", sha256="", arch="m", size=(1, 8, 8), mean=(0.5,), std=(0.5,), crop_pct=1.0)
FASHION = ("t-shirt", "trouser", "ankle boot")


def save(root: Path, *folders: str, each: int = 4) -> Path:
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            Image.new("L", (8, 8), number).save(root / folder / f"{number}.png")
    return root


def labels(data: Data) -> dict[str, int]:
    """The label of each class folder, over all images of a set."""
    images = data.held_out.images
    assert isinstance(images, FolderImages)
    return {path.parent.name: label for path, label in zip(images.paths, images.labels, strict=True)}


def match(names: Sequence[str], outputs: int, labels: Sequence[str] = (), empty: Sequence[str] = ()) -> ClassMatch:
    return match_classes(names, outputs, None, labels, empty)


def test_folders_are_matched_by_the_models_labels_in_any_order(tmp_path: Path) -> None:
    save(tmp_path, "Ankle_boot", "T-shirt", "trouser")
    data = load_data(tmp_path, replace(SOURCE, labels=FASHION), 3, calibration=2)
    assert labels(data) == {"Ankle_boot": 2, "T-shirt": 0, "trouser": 1}
    assert data.held_out.labelled
    assert data.notes == ()


def test_a_subset_of_the_classes_is_measured(tmp_path: Path) -> None:
    data = load_data(save(tmp_path, "ankle boot"), replace(SOURCE, labels=FASHION), 3, calibration=2)
    assert labels(data) == {"ankle boot": 2}
    assert data.held_out.labelled
    assert data.notes == ("the images have 1 of the model's 3 classes; accuracy is measured on these",)


def test_names_that_the_model_does_not_know_are_refused() -> None:
    text = "1 of 3 class folders are not among the classes of the model's labels: sandal; it has t-shirt, .*--classes"
    with pytest.raises(LoadError, match=text):
        match(("t-shirt", "trouser", "sandal"), 3, FASHION)


def test_two_folders_of_one_class_are_refused() -> None:
    with pytest.raises(LoadError, match="the class folders T-shirt and t_shirt are one class"):
        match(("T-shirt", "t_shirt"), 3, FASHION)


def test_labels_that_none_of_the_folders_has_leave_the_sorted_order_as_an_assumption() -> None:
    found = match(("b", "a", "c"), 3, FASHION)
    assert found.indices == {"a": 0, "b": 1, "c": 2}
    assert (
        "are assumed to be the model's outputs, since none of them is a label of the model (t-shirt" in found.notes[0]
    )


def test_synsets_and_words_of_imagenet_are_known() -> None:
    assert match(("n01443537", "n01440764"), 1000).indices == {"n01443537": 1, "n01440764": 0}
    assert match(("n01443537_goldfish",), 1000).indices == {"n01443537_goldfish": 1}
    assert match(("goldfish", "great_white_shark"), 1000).indices == {"goldfish": 1, "great_white_shark": 2}
    with pytest.raises(LoadError, match="not among the classes of imagenet-1k"):
        match(("n01443537", "background"), 1000)
    crane = match(("crane", "goldfish"), 1000)  # ImageNet has a bird and a machine of this name
    assert crane.indices is None


@pytest.mark.parametrize(
    ("names", "outputs", "indices"),
    [
        (("0", "2", "1"), 3, (0, 2, 1)),
        (("3", "7"), 10, (3, 7)),
        (("1", "2", "3"), 3, (0, 1, 2)),  # counted from 1
        (("class_0", "class_4", "class_9"), 10, (0, 4, 9)),
        (("000", "001"), 2, (0, 1)),
        (("2", "10"), 2, (0, 1)),  # no indices of two outputs: sorted, by number
        (("n01440764", "n01443537"), 2, (0, 1)),
    ],
)
def test_numbers_are_indices(names: tuple[str, ...], outputs: int, indices: tuple[int, ...]) -> None:
    found = match(names, outputs)
    assert found.indices == dict(zip(names, indices, strict=True))
    assert any("taken as indices" in note or "assumed" in note for note in found.notes)


def test_numbers_that_text_sorts_otherwise_are_noted() -> None:
    assert "torchvision's ImageFolder sorts them as text" in match([str(n) for n in range(11)], 11).notes[0]


def test_an_empty_class_folder_does_not_shift_the_others() -> None:
    found = match(("cat", "eel"), 3, empty=("dog",))
    assert found.indices == {"cat": 0, "eel": 2}


def test_without_names_and_with_another_count_there_are_no_labels() -> None:
    found = match(("cat", "dog"), 3)
    assert found.indices is None
    assert "2 classes, the model 3 outputs, and nothing says which class is which output" in found.notes[0]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("classes.txt", "dog\ncat\n\n"),
        ("class_to_idx.json", json.dumps({"cat": 1, "dog": 0})),
        ("list.json", json.dumps(["dog", "cat"])),
        ("id2label.json", json.dumps({"0": "dog", "1": "cat"})),
        ("index.json", json.dumps({"0": ["n1", "dog"], "1": ["n2", "cat"]})),
        ("synsets.txt", "n02084071 dog\nn02121808 cat\n"),
    ],
)
def test_class_files(tmp_path: Path, name: str, text: str) -> None:
    save(tmp_path / "data", "cat", "dog")
    inside = name in ("classes.txt", "class_to_idx.json")
    file = tmp_path / ("data" if inside else "") / name
    file.write_text(text, encoding="utf-8")
    data = load_data(tmp_path / "data", SOURCE, 5, calibration=2, classes=None if inside else file)
    assert labels(data) == {"cat": 1, "dog": 0}
    assert data.held_out.labelled
    assert not any("left out" in note for note in data.notes)


def test_a_given_class_file_comes_before_that_of_the_folder(tmp_path: Path) -> None:
    save(tmp_path / "data", "cat", "dog")
    (tmp_path / "data" / "classes.txt").write_text("cat\ndog\n")
    (tmp_path / "mine.txt").write_text("dog\ncat\n")
    data = load_data(tmp_path / "data", SOURCE, 2, calibration=2, classes=tmp_path / "mine.txt")
    assert labels(data) == {"cat": 1, "dog": 0}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "gives no classes"),
        ("{", "gives no classes"),
        ('{"cat": 0.5}', "gives no classes"),
        ('{"cat": -1, "dog": 0}', "gives the class index -1"),
        ("cat\ncat\n", "gives the class 'cat' twice"),
        ("cat\neel\n", "1 of 2 class folders are not among the classes of .*: dog"),
        ('{"cat": 0, "dog": 7}', "gives dog the index 7, and the model has 2 outputs"),
    ],
)
def test_class_files_that_do_not_fit_are_refused(tmp_path: Path, text: str, error: str) -> None:
    save(tmp_path / "data", "cat", "dog")
    (tmp_path / "file").write_text(text)
    with pytest.raises(LoadError, match=error):
        load_data(tmp_path / "data", SOURCE, 2, calibration=2, classes=tmp_path / "file")


def test_class_files_that_are_none(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", tmp_path / ("x" * 300), Path("a\0b")):
        with pytest.raises(LoadError):
            read_class_file(path)


def test_two_class_files_in_a_folder_have_to_agree(tmp_path: Path) -> None:
    save(tmp_path, "cat", "dog")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    (tmp_path / "class_to_idx.json").write_text('{"cat": 1, "dog": 0}')
    with pytest.raises(LoadError, match="give different classes; remove one, or give --classes"):
        load_data(tmp_path, SOURCE, 2, calibration=2)


def test_class_files_are_for_folders(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"")
    with pytest.raises(UsageError, match="--classes, --alpha applies to folders of images"):
        load_data(tmp_path / "a.npz", SOURCE, 2, classes=tmp_path / "x", alpha="white")


def test_splits_may_lack_classes_whose_names_are_known(tmp_path: Path) -> None:
    save(tmp_path / "train", "t-shirt", "trouser", "ankle boot")
    save(tmp_path / "val", "trouser")
    data = load_data(tmp_path, replace(SOURCE, labels=FASHION), 3)
    assert labels(data) == {"trouser": 1}


def test_a_table_that_need_not_be_complete_passes_names_on() -> None:
    table = ClassTable({"cat": 0}, "words", complete=False)
    assert table.indices["cat"] == 0
