"""Image files in folders: train and held-out splits, class folders, and files that are decoded when they are read."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mpcompile.data.class_file import IN_FOLDER, class_file_in, read_class_file
from mpcompile.data.class_folders import LabelledImages, label_trees
from mpcompile.data.class_names import ClassTable, is_known_class
from mpcompile.data.encoded_images import EncodedImages
from mpcompile.data.image_tree import ImageTree, printable, read_tree, shown
from mpcompile.data.images import MODES
from mpcompile.data.picture import Reading
from mpcompile.data.split_folders import splits_in, without_wrappers
from mpcompile.data.transform import evaluation_transform
from mpcompile.errors import LoadError
from mpcompile.ir.source import Source


@dataclass(frozen=True)
class FolderImages(EncodedImages):
    """Image files of folders. `names` are the class folders."""

    paths: tuple[Path, ...]


def read_folders(
    root: Path, source: Source, outputs: int, class_file: Path | None, reading: Reading, notes: list[str]
) -> tuple[FolderImages, FolderImages | None]:
    """The images of the training folder and of the held-out folder; without both, all images and None.

    `class_file` is the file of --classes. Sentences for the report are appended to `notes`. Raises LoadError.
    """
    if source.size[0] not in MODES:
        raise LoadError(
            f"the model takes images of {source.size[0]} channels, and image files have 1 or 3; give an .npz file"
        )

    def is_class(parent: Path, name: str) -> bool:
        given = class_file or class_file_in(root) or class_file_in(parent)
        return is_known_class(name, outputs, _table(given) if given else None, source.labels)

    tree = without_wrappers(read_tree(root), is_class)
    found = class_file or class_file_in(root) or class_file_in(tree.root)
    table = _table(found) if found else None
    trees = _split_trees(tree, lambda _, name: is_known_class(name, outputs, table, source.labels), notes)
    for part in trees:
        _note_left_out(part, notes)
    sets = [
        _images(part, labelled, source, outputs, reading)
        for part, labelled in zip(trees, label_trees(trees, outputs, table, source.labels, notes), strict=True)
    ]
    return sets[0], sets[1] if len(sets) == 2 else None


def _table(path: Path) -> ClassTable:
    """The classes of a class file. Raises LoadError."""
    return ClassTable(read_class_file(path), printable(str(path)))


def _split_trees(tree: ImageTree, is_class: Callable[[Path, str], bool], notes: list[str]) -> list[ImageTree]:
    """The tree of training images and that of held-out images, or only one tree. Raises LoadError."""
    splits = splits_in(tree)
    if splits is None:
        return [tree]
    if splits.held_out is None:
        notes.append(f"there is only {splits.train}/: calibration, validation and held-out images are all from it")
    elif splits.calibrates_on_held_out:
        notes.append(f"there is no train/: calibration images are from {splits.train}/")
    if splits.unused:
        notes.append(f"{shown(f'{name}/' for name in splits.unused)} beside the splits was not used")
    return [
        without_wrappers(tree.below(name), is_class) for name in (splits.train, splits.held_out) if name is not None
    ]


def _note_left_out(tree: ImageTree, notes: list[str]) -> None:
    """Appends notes about the files of a tree that are not read."""
    others = [path for path in tree.others if path.name not in IN_FOLDER]
    name = printable(tree.root.name)
    if others:
        notes.append(f"{len(others)} files in {name}/ were left out, since their suffix is not that of an image")
    if tree.hidden:
        notes.append(f"hidden and system files and folders of {name}/ were left out: {shown(tree.hidden)}")


def _images(tree: ImageTree, labelled: LabelledImages, source: Source, outputs: int, reading: Reading) -> FolderImages:
    """The labelled images of a tree, with the preprocessing of the source."""
    known = all(label >= 0 for label in labelled.labels)
    return FolderImages(
        paths=tuple(tree.root / path for path in labelled.images),
        labels=labelled.labels,
        names=labelled.names,
        transform=evaluation_transform(source),
        mode=MODES[source.size[0]],
        classes=outputs if known else 0,
        reading=reading,
    )
