"""Labels of a dataset: which output is which class, and when accuracy is not measured."""

from typing import Any

import pytest

from mpcompile.data.class_names import ClassTable
from mpcompile.data.dataset_classes import output_indices
from mpcompile.data.dataset_name import DatasetName
from mpcompile.data.dataset_splits import chosen_splits
from mpcompile.errors import LoadError

UNKNOWN = "accuracy is not measured"


def found(
    values: list[Any],
    outputs: int,
    names: tuple[str, ...] | None = None,
    given: ClassTable | None = None,
    labels: tuple[str, ...] = (),
) -> tuple[list[int], str]:
    notes: list[str] = []
    [indices] = output_indices([values], names, outputs, given, labels, notes)
    return list(indices), "; ".join(notes)


@pytest.mark.parametrize(
    ("values", "outputs", "names", "labels", "expected", "note"),
    [
        ([2, 0, 1], 3, None, (), [2, 0, 1], "the numbers of the classes (0, 1, 2) are taken as indices"),
        ([3, 1], 3, None, (), [2, 0], "counted from 1"),
        ([3, 0], 3, None, (), [-1, -1], UNKNOWN),
        ([2, 0], 5, None, (), [2, 0], "the images have 2 of the model's 5 classes"),
        (["dog", "cat"], 2, None, ("cat", "dog"), [1, 0], ""),
        (["dog", "cat"], 2, None, (), [-1, -1], "nothing says which class is which output"),
        ([0, 1], 2, ("dog", "cat"), ("cat", "dog"), [1, 0], ""),
        ([0, 1], 2, ("dog", "cat"), (), [0, 1], "the dataset's classes in their order (dog, cat) are assumed"),
        ([0, 1], 3, ("dog", "cat"), (), [-1, -1], "the images have 2 classes (dog, cat), the model 3 outputs"),
        ([0, 1, 2], 3, ("1", "10", "2"), (), [0, 1, 2], "the dataset's classes in their order (1, 10, 2) are assumed"),
        ([0, 2], 3, ("0", "1", "2"), (), [0, 2], "the numbers of the classes"),
        ([0, 1], 0, None, (), [-1, -1], "the images have 2 classes, and the model's outputs are no classes"),
        ([0, -1], 2, None, (), [-1, -1], "1 of 2 images have no label that is one class"),
        ([[0, 1], [1]], 2, None, (), [-1, -1], "the images have no label that is one class"),
        ([None], 2, None, (), [-1], UNKNOWN),
        ([True], 2, None, (), [-1], UNKNOWN),
    ],
)
def test_classes_of_a_dataset(
    values: list[Any],
    outputs: int,
    names: tuple[str, ...] | None,
    labels: tuple[str, ...],
    expected: list[int],
    note: str,
) -> None:
    indices, told = found(values, outputs, names, labels=labels)
    assert indices == expected
    assert note in told if note else not told


def test_a_class_file_gives_the_outputs() -> None:
    table = ClassTable({"cat": 0, "dog": 1}, "classes.txt")
    assert found([0, 1], 2, ("dog", "cat"), table) == ([1, 0], "")
    with pytest.raises(
        LoadError, match="1 of 2 classes are not among the classes of classes.txt: cow; it has cat, dog"
    ):
        found([0, 1], 2, ("cow", "cat"), table)
    with pytest.raises(LoadError, match="a label is 2, and the dataset names 2 classes"):
        found([2], 2, ("cow", "cat"))


@pytest.mark.parametrize(
    ("names", "options", "expected"),
    [
        (["train", "validation", "test"], {}, ("train", "validation")),
        (["test", "train"], {}, ("train", "test")),
        (["validation", "test"], {}, ("validation", "test")),
        (["train"], {}, ("train", None)),
        (["all"], {}, ("all", None)),
        (["train", "extra"], {}, ("train", None)),
        (["train", "extra"], {"held_out": "extra"}, ("train", "extra")),
        (["a", "b"], {"held_out": "b"}, ("a", "b")),
        (["train", "validation", "test"], {"train": "validation"}, ("validation", "test")),
        (["train", "validation", "test"], {"held_out": "test"}, ("train", "test")),
        (["train", "val_a", "val_b"], {"train": "val_a", "held_out": "val_b"}, ("val_a", "val_b")),
    ],
)
def test_splits_are_chosen(names: list[str], options: dict[str, str], expected: tuple[str, str | None]) -> None:
    chosen = chosen_splits(DatasetName("hfds", "x", **options), names)
    assert (chosen.train, chosen.held_out) == expected
    assert bool(chosen.notes) == (expected[1] is None or ("train" not in options and expected[0] != "train"))


@pytest.mark.parametrize(
    ("names", "options", "text"),
    [
        (
            ["a", "b"],
            {},
            "hfds/x has the splits a, b, and no usual name tells which to calibrate on; give ,train=SPLIT",
        ),
        (["train"], {"train": "x"}, "hfds/x has no split 'x'; it has train"),
        (["train", "val"], {"train": "val", "held_out": "val"}, "train and held_out are both 'val'"),
        (["train", "val", "dev"], {}, "has the splits train, val, dev; val and dev mean one split; give ,train=SPLIT"),
        (["test"], {"held_out": "test"}, "no usual name tells which to calibrate on"),
    ],
)
def test_splits_that_cannot_be_chosen(names: list[str], options: dict[str, str], text: str) -> None:
    with pytest.raises(LoadError, match=text):
        chosen_splits(DatasetName("hfds", "x", **options), names)
