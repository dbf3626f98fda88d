"""The image files below a folder, without hidden and system files."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath

from mpcompile.errors import LoadError

SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")  # in lower case
)
# What operating systems, storage devices and tools put into folders of images, in lower case. Names that begin with a
# dot are hidden as well.
SYSTEM_NAMES = frozenset(
    (
        *("__macosx", "network trash folder", "temporary items", "icon\r"),
        *(
            "$recycle.bin",
            "recycler",
            "system volume information",
            "found.000",
            "thumbs.db",
            "ehthumbs.db",
            "desktop.ini",
        ),
        *("lost+found", "@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "__pycache__"),
    )
)


@dataclass(frozen=True, slots=True)
class ImageTree:
    """The files below `root`; all paths are relative to it.

    `images` are in timm's order: by path, numbers by their value. `folders` are all folders, empty ones included.
    `others` counts files whose suffix is not that of an image. `hidden` are hidden and system files and folders that
    hold images.
    """

    root: Path
    images: tuple[PurePath, ...]
    folders: tuple[PurePath, ...]
    others: tuple[PurePath, ...]
    hidden: tuple[PurePath, ...]

    def below(self, folder: str) -> "ImageTree":
        """The part of the tree that is below a folder."""
        kept = (_below(paths, folder) for paths in (self.images, self.folders, self.others, self.hidden))
        return ImageTree(self.root / folder, *kept)

    def top_folders(self) -> tuple[str, ...]:
        """The folders directly below the root that hold images at any depth, in order."""
        return tuple(dict.fromkeys(path.parts[0] for path in self.images if len(path.parts) > 1))


def _below(paths: tuple[PurePath, ...], folder: str) -> tuple[PurePath, ...]:
    return tuple(path.relative_to(folder) for path in paths if len(path.parts) > 1 and path.parts[0] == folder)


def is_hidden(name: str) -> bool:
    """Whether a name is that of a hidden or system file or folder."""
    return name.startswith(".") or name.casefold() in SYSTEM_NAMES


def read_tree(root: Path) -> ImageTree:
    """The files below a folder, links followed. Raises LoadError for a link to a folder above, and if unreadable."""
    images: list[PurePath] = []
    folders: list[PurePath] = []
    others: list[PurePath] = []
    hidden: list[PurePath] = []
    for folder, inner, names in os.walk(root, followlinks=True, onerror=_raise_unreadable):
        here = Path(folder).relative_to(root)
        for name in inner:
            if is_hidden(name):
                if _holds_images(Path(folder, name)):
                    hidden.append(here / name)
            else:
                _require_no_cycle(Path(folder, name))
                folders.append(here / name)
        inner[:] = [name for name in inner if not is_hidden(name)]
        for name in names:
            is_image = PurePath(name).suffix.lower() in SUFFIXES
            if is_hidden(name):
                hidden += [here / name] if is_image else []
            elif is_image:
                images.append(here / name)
            elif Path(folder, name).is_file():
                others.append(here / name)
    return ImageTree(root, *(tuple(sorted(paths, key=_by_number)) for paths in (images, folders, others, hidden)))


def _raise_unreadable(error: OSError) -> None:
    raise LoadError(f"{error.filename} cannot be read: {error.strerror}")


def _holds_images(folder: Path) -> bool:
    if folder.is_symlink():
        return False
    return any(PurePath(name).suffix.lower() in SUFFIXES for _, _, names in os.walk(folder) for name in names)


def _require_no_cycle(folder: Path) -> None:
    """Raises LoadError if a folder is a symbolic link to a folder above it: a walk would not end."""
    if folder.is_symlink():
        target = os.path.realpath(folder)
        above = {os.path.realpath(parent) for parent in folder.absolute().parents}
        if target in above:
            raise LoadError(f"{folder.parent} contains a link to a folder above it: {folder}; remove the link")


def _by_number(path: PurePath) -> tuple[list[str | int], str]:
    return by_number(str(path)), str(path)


def by_number(text: str) -> list[str | int]:
    """A key that sorts texts as timm does: without case, and numbers in them by their value."""
    parts = re.split(r"(\d+)", text.lower())  # every second part is a number
    return [int(part) if index % 2 else part for index, part in enumerate(parts)]


def shown(names: Iterable[object], most: int = 4) -> str:
    """The first names of a list as printable text, and how many there are beyond."""
    texts = [printable(str(name)) for name in names]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most:,} more" if len(texts) > most else "")


def printable(name: str) -> str:
    """A file's name as text that can be printed and written as UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name)
