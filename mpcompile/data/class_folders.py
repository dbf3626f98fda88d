"""The class folders of an image tree, and the label of each image."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from mpcompile.data.class_names import INSTEAD, ClassMatch, ClassTable, match_classes
from mpcompile.data.image_tree import ImageTree, by_number, printable, shown
from mpcompile.data.split_folders import require_no_inner_splits
from mpcompile.errors import LoadError

FolderOf = Callable[[PurePath], str]


@dataclass(frozen=True, slots=True)
class LabelledImages:
    """Images of a tree with their labels: indices of the model's outputs, or -1. `names` are the class folders."""

    images: tuple[PurePath, ...]
    labels: tuple[int, ...]
    names: tuple[str, ...]


def label_trees(
    trees: Sequence[ImageTree], outputs: int, given: ClassTable | None, labels: Sequence[str], notes: list[str]
) -> list[LabelledImages]:
    """The images of each tree (one, or training and held-out) with their labels.

    The folders at the top of a tree are the classes. The innermost folders are the classes only if those at the top
    cannot be matched to the outputs and the innermost can. Notes for the report are appended to `notes`. Raises
    LoadError.
    """
    images = [_images_in_classes(tree, notes) for tree in trees]
    if all(len(path.parts) == 1 for paths in images for path in paths):
        notes.append(f"the images have no labels: {INSTEAD}")
        return [LabelledImages(paths, (-1,) * len(paths), ()) for paths in images]
    error = None
    match: ClassMatch | None = None
    try:
        match = _match(trees, images, _top, outputs, given, labels)
    except LoadError as found:
        error = found
    if match is None or match.indices is None:
        inner = _match_of_innermost(trees, images, outputs, given, labels)
        if inner is not None:
            names = shown(_union(images, _innermost), 3)
            notes += [f"the innermost folders ({names}) are taken as classes, not those at the top", *inner.notes]
            return [_labelled(paths, inner, _innermost) for paths in images]
    if match is None:
        raise error or AssertionError
    notes += match.notes
    return [_labelled(paths, match, _top) for paths in images]


def _top(path: PurePath) -> str:
    return path.parts[0] if len(path.parts) > 1 else ""


def _innermost(path: PurePath) -> str:
    return path.parent.name


def _images_in_classes(tree: ImageTree, notes: list[str]) -> tuple[PurePath, ...]:
    """The images of a tree: all of one folder without class folders, or those in class folders. Raises LoadError."""
    if not tree.images:
        raise LoadError(f"{tree.root} has no images; give a folder of images, or one with a subfolder for each class")
    nested = tuple(path for path in tree.images if len(path.parts) > 1)
    direct = len(tree.images) - len(nested)
    if not nested:
        return tree.images
    if direct >= len(nested):
        raise LoadError(
            f"{tree.root} has {direct:,} images beside folders with {len(nested):,} ({shown(tree.top_folders())}); "
            "needed is one or the other: move the images or the folders away"
        )
    require_no_inner_splits(tree)
    if direct:
        notes.append(f"{direct:,} images beside the class folders of {printable(tree.root.name)}/ were left out")
    return nested


def _match(
    trees: Sequence[ImageTree],
    images: Sequence[tuple[PurePath, ...]],
    folder_of: FolderOf,
    outputs: int,
    given: ClassTable | None,
    labels: Sequence[str],
) -> ClassMatch:
    """The match of class folders, for both splits together. Raises LoadError."""
    sets: list[set[str]] = [{folder_of(path) for path in paths} for paths in images]
    names = _union(images, folder_of)
    folders = [path.parts[0] for path in trees[0].folders if len(path.parts) == 1]
    empty = [name for name in folders if name not in names]
    different = sorted((sets[0].union(*sets) - sets[0].intersection(*sets)) - {""})
    match = None if "" in names else match_classes(names, outputs, given, labels, empty)
    if different and (match is None or match.by == "order"):
        raise LoadError(
            f"{trees[0].root} and {trees[1].root} have different classes: only one of them has {shown(different)}; "
            "give both the same class folders, or the model's classes with --classes FILE"
        )
    if match is None:
        raise AssertionError("class folders without a name")
    return match


def _match_of_innermost(
    trees: Sequence[ImageTree],
    images: Sequence[tuple[PurePath, ...]],
    outputs: int,
    given: ClassTable | None,
    labels: Sequence[str],
) -> ClassMatch | None:
    """The match of the innermost folders, if they are known by name or are as many as the outputs; else None."""
    names = _union(images, _innermost)
    if names == _union(images, _top) or "" in names:
        return None
    try:
        match = _match(trees, images, _innermost, outputs, given, labels)
    except LoadError:
        return None
    return match if match.indices is not None and (match.by == "table" or len(names) == outputs) else None


def _union(images: Sequence[tuple[PurePath, ...]], folder_of: FolderOf) -> list[str]:
    """The class folders of all splits in order, numbers by their value."""
    return sorted({folder_of(path) for paths in images for path in paths}, key=lambda name: (by_number(name), name))


def _labelled(paths: tuple[PurePath, ...], match: ClassMatch, folder_of: FolderOf) -> LabelledImages:
    indices = match.indices
    labels = tuple(-1 if indices is None else indices[folder_of(path)] for path in paths)
    return LabelledImages(paths, labels, tuple(_union([paths], folder_of)))
