"""Matches class folders to the outputs of a model: by an index file, the model's labels, numbers, or sorted order."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from mpcompile.data.image_tree import by_number, printable, shown
from mpcompile.errors import LoadError

FOLDERS = "class folders"
INSTEAD = "the outputs are compared with the dense model's, and accuracy is not measured"
CLASS_HELP = "give --classes FILE with one class name a line, in the order of the model's outputs"
MAPPING_HELP = "give --classes FILE with one folder name a line, in the order of the model's outputs"


@dataclass(frozen=True, slots=True)
class ClassTable:
    """Output index by class name, and where the table comes from. `complete`: a name that it lacks is an error."""

    indices: Mapping[str, int]
    origin: str
    complete: bool = True


@dataclass(frozen=True, slots=True)
class ClassMatch:
    """The output index of each class folder, or None if it cannot be known; notes for the report.

    `by` says what gave the indices: is `table`, `numbers` or `order`; `order` too if there are no indices.
    """

    indices: Mapping[str, int] | None
    notes: tuple[str, ...]
    by: str


def match_classes(
    names: Sequence[str], outputs: int, given: ClassTable | None, labels: Sequence[str], empty: Sequence[str] = ()
) -> ClassMatch:
    """Matches class folders to the outputs of a model.

    Tried in order: `given`, `labels`, ImageNet's class lists, numbers in the names, sorted order. Raises LoadError if a
    table knows some of the names and not the others.

    Args:
        names: folders that hold images.
        outputs: number of outputs of the model, each of which is a class; 0 if they are none.
        given: the table of a class file; then no other is tried.
        labels: the model's own labels, in the order of its outputs.
        empty: further folders, without images.
    """
    if outputs == 0:
        return ClassMatch(None, (f"{no_classes(len(names))}: {INSTEAD}",), "order")
    return (
        known_by_name(names, outputs, given, labels)
        or known_by_number(names, outputs)
        or _sorted(names, outputs, empty, labels if len(labels) == outputs else ())
    )


def known_by_name(
    names: Sequence[str], outputs: int, given: ClassTable | None, labels: Sequence[str], what: str = FOLDERS
) -> ClassMatch | None:
    """The match by the first table that knows the names: `given`, or else `labels` and ImageNet's class lists.

    None if no table does. `what` is what errors call the names. Raises LoadError if a table knows only some of them.
    """
    tables = [given] if given else _known_tables(outputs, labels)
    for table in tables:
        found = _match(table, names)
        unknown = [name for name, index in found.items() if index is None]
        indices = {name: index for name, index in found.items() if index is not None}
        if unknown and table.complete and (given or indices):
            raise LoadError(
                f"{len(unknown)} of {len(names)} {what} are not among the classes of {table.origin}: "
                f"{shown(unknown)}; it has {shown(table.indices)}. Rename or remove them, or "
                f"{MAPPING_HELP if what == FOLDERS else CLASS_HELP}"
            )
        if not unknown:
            checked = _checked(indices, outputs, table.origin, what)
            return ClassMatch(checked, subset_note(len(names), outputs), "table")
    return None


def no_classes(classes: int) -> str:
    """Says that images of this many classes do not fit a model without classes."""
    return f"the images have {classes} classes, and the model's outputs are no classes"


def is_known_class(name: str, outputs: int, given: ClassTable | None, labels: Sequence[str]) -> bool:
    """Whether a table that `match_classes` would try has this name."""
    tables = [given] if given else _known_tables(outputs, labels) if outputs else []
    return any(_match(table, [name])[name] is not None for table in tables)


def _known_tables(outputs: int, labels: Sequence[str]) -> list[ClassTable]:
    """The tables that a model with these labels and this number of outputs may have."""
    tables = []
    if labels and len(labels) == outputs:
        counts = {label: labels.count(label) for label in labels}
        unique = {label: index for index, label in enumerate(labels) if counts[label] == 1}
        tables.append(ClassTable(unique, "the model's labels"))
    return [*tables, *_imagenet_tables(outputs)]


@cache
def _imagenet_tables(outputs: int) -> tuple[ClassTable, ...]:
    """ImageNet's synsets, and the first word of each, for the list that has this number of classes."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": outputs})
    if subset is None:
        return ()
    synsets = ImageNetInfo(subset)
    words: dict[str, list[int]] = {}
    for index in range(outputs):
        for word in synsets.index_to_description(index).split(", "):
            words.setdefault(plain(word), []).append(index)
    return (
        ClassTable({synsets.index_to_label_name(index): index for index in range(outputs)}, f"{subset} (synsets)"),
        # A model of 1,000 outputs need not be ImageNet's, and words such as `tench` may be others' classes too.
        ClassTable({word: found[0] for word, found in words.items() if len(found) == 1}, f"{subset} (words)", False),
    )


def plain(name: str) -> str:
    """A class name without case, spaces, punctuation and ways of writing accents: `T_shirt` and `t-shirt` are one."""
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", name).casefold()).strip()


def _match(table: ClassTable, names: Sequence[str]) -> Mapping[str, int | None]:
    """The index of each name: as it is written, in plain form, or by the synset at its beginning; else None."""
    forms: dict[str, set[int]] = {}
    for name, index in table.indices.items():
        forms.setdefault(plain(name), set()).add(index)
    plainly = {form: min(indices) for form, indices in forms.items() if form and len(indices) == 1}
    found: dict[str, int | None] = {}
    for name in names:
        synset = re.match(r"n\d{8}(?=[\W_]|$)", name)
        keys = (table.indices.get(name), plainly.get(plain(name)), table.indices.get(synset[0]) if synset else None)
        found[name] = next((index for index in keys if index is not None), None)
    return found


def _checked(indices: Mapping[str, int], outputs: int, origin: str, what: str) -> Mapping[str, int]:
    """The indices. Raises LoadError if one is not an output, or two names have one."""
    outside = [name for name, index in indices.items() if index >= outputs]
    if outside:
        raise LoadError(
            f"{origin} gives {printable(outside[0])} the index {indices[outside[0]]}, and the model has {outputs} "
            "outputs; give a file of its classes (--classes)"
        )
    first: dict[int, str] = {}
    for name, index in indices.items():
        if (other := first.setdefault(index, name)) != name:
            raise LoadError(
                f"the {what} {printable(other)} and {printable(name)} are one class of {origin}; merge or rename them"
            )
    return indices


def subset_note(found: int, outputs: int) -> tuple[str, ...]:
    """A note if the images have fewer classes than the model has outputs."""
    if found >= outputs:
        return ()
    return (f"the images have {found} of the model's {outputs} classes; accuracy is measured on these",)


def known_by_number(names: Sequence[str], outputs: int, what: str = FOLDERS) -> ClassMatch | None:
    """Indices from numbers, alone (`7`) or behind one common word (`class_7`), from 0 or from 1.

    None if the numbers do not fit the outputs.
    """
    parts = [re.fullmatch(r"(\D*)(\d{1,9})", name) for name in names]
    numbers = {name: int(part[2]) for name, part in zip(names, parts, strict=True) if part}
    words = {part[1] for part in parts if part}
    if len(set(numbers.values())) != len(names) or len(words) != 1:
        return None
    low, high = min(numbers.values()), max(numbers.values())
    if high > outputs or (high == outputs and low == 0):
        return None
    start = 1 if high == outputs else 0
    note = f"the numbers of the {what} ({shown(names, 3)}) are taken as indices of the model's outputs"
    note += ", counted from 1" if start else ""
    indices = {name: number - start for name, number in numbers.items()}
    note += _text_order(names) if what == FOLDERS else ""
    return ClassMatch(indices, (note, *subset_note(len(names), outputs)), "numbers")


def _sorted(names: Sequence[str], outputs: int, empty: Sequence[str], labels: Sequence[str]) -> ClassMatch:
    """Indices in sorted order if there are as many folders as outputs, with a note that the order is assumed."""
    folders = names if len(names) == outputs else [*names, *empty]
    if len(folders) != outputs:
        count = f"the images have {len(names)} classes, the model {outputs} outputs"
        unknown = "and nothing says which class is which output"
        return ClassMatch(None, (f"{count}, {unknown}: {INSTEAD}; to measure accuracy, {MAPPING_HELP}",), "order")
    ordered = sorted(folders, key=by_number)
    why = (
        f"none of them is a label of the model ({shown(labels, 3)})"
        if labels
        else "neither the model nor a file names its classes"
    )
    note = f"the class folders in sorted order ({shown(ordered, 3)}) are assumed to be the model's outputs, since {why}"
    indices = {name: index for index, name in enumerate(ordered) if name in names}
    notes = (f"{note}; if that is wrong, {MAPPING_HELP}{_text_order(folders)}", *subset_note(len(names), outputs))
    return ClassMatch(indices, notes, "order")


def _text_order(names: Sequence[str]) -> str:
    if sorted(names, key=by_number) == sorted(names):
        return ""
    return "; torchvision's ImageFolder sorts them as text, folder 10 before folder 2"
