"""Labels of a dataset -> indices of the model's outputs, by the same rules as class folders."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mpcompile.data.class_names import (
    CLASS_HELP,
    INSTEAD,
    ClassMatch,
    ClassTable,
    known_by_name,
    known_by_number,
    no_classes,
    subset_note,
)
from mpcompile.data.image_tree import by_number, shown
from mpcompile.errors import LoadError

WHAT = "classes"


def output_indices(
    columns: Sequence[Sequence[Any]],
    names: tuple[str, ...] | None,
    outputs: int,
    given: ClassTable | None,
    labels: Sequence[str],
    notes: list[str],
) -> list[tuple[int, ...]]:
    """The output of each image, for each column of labels; -1 for all images if it cannot be known.

    Args:
        columns: labels of the splits: class indices or names.
        names: the names of the class indices, or None.
        outputs: number of outputs of the model; 0 if they are no classes.
        given: the table of --classes.
        labels: the model's own labels.
        notes: sentences for the report are appended.

    Raises LoadError.
    """
    keys = [[_name_of(value, names) for value in column] for column in columns]
    match = _match(keys, names, outputs, given, labels)
    notes += match.notes
    indices = match.indices
    return [tuple(-1 if indices is None or key is None else indices[key] for key in column) for column in keys]


def _name_of(value: Any, names: tuple[str, ...] | None) -> str | None:
    """The name of a class; of an index without names, its digits. None for what is no single class."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        return None
    if names is None:
        return str(int(value))
    if value >= len(names):
        raise LoadError(f"a label is {value}, and the dataset names {len(names)} classes; repair the dataset")
    return names[value]


def _match(
    keys: Sequence[Sequence[str | None]],
    names: tuple[str, ...] | None,
    outputs: int,
    given: ClassTable | None,
    labels: Sequence[str],
) -> ClassMatch:
    """The output of each class name; without indices if they cannot be known. Raises LoadError."""
    count = sum(map(len, keys))
    without = sum(key is None for column in keys for key in column)
    if without:
        whose = "the images have" if without == count else f"{without:,} of {count:,} images have"
        return _unknown(f"{whose} no label that is one class: {INSTEAD}")
    found = names or sorted({key for column in keys for key in column if key is not None}, key=by_number)
    if not outputs:
        return _unknown(f"{no_classes(len(found))}: {INSTEAD}")
    match = known_by_name(found, outputs, given, labels, WHAT) or known_by_number(found, outputs, WHAT)
    if match is not None:
        return match
    if names is None or len(names) != outputs:
        return _unknown(
            f"the images have {len(found)} classes ({shown(found, 3)}), the model {outputs} outputs, and nothing says "
            f"which class is which output: {INSTEAD}; to measure accuracy, {CLASS_HELP}"
        )
    why = (
        f"none of them is a label of the model ({shown(labels, 3)})"
        if len(labels) == outputs
        else ("neither the model nor a file names its classes")
    )
    note = (
        f"the dataset's classes in their order ({shown(names, 3)}) are assumed to be the model's outputs, since {why}; "
        f"if that is wrong, {CLASS_HELP}"
    )
    return ClassMatch(
        {name: index for index, name in enumerate(names)}, (note, *subset_note(len(names), outputs)), "order"
    )


def _unknown(note: str) -> ClassMatch:
    return ClassMatch(None, (note,), "order")
