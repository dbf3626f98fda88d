"""Image files in a folder, with one subfolder per class; each is decoded when it is read."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mpcompile.data.images import MODES
from mpcompile.errors import LoadError
from mpcompile.ir.model import Source

HELD_OUT_FOLDERS = ("val", "validation", "test")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True)
class FolderImages:
    """Image files after timm's evaluation transform: float32 tensors of the model's input size (c, h, w).

    `labels` are indices of `names`, the class folders, or -1 if there are none. `mode` is PIL's colour mode. Reading
    raises LoadError for a file that cannot be decoded.
    """

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    names: tuple[str, ...]
    transform: Callable[[Any], Tensor]
    mode: str

    @property
    def classes(self) -> int:
        """The number of class folders; 0 without labels."""
        return len(self.names)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture, label = self.picture(index)
        return self.transform(picture), label

    def picture(self, index: int) -> tuple[Any, int]:
        """The image as a PIL image, without the transform, and its label."""
        from PIL import Image

        path = self.paths[index]
        if path.exists() and not path.is_file():  # reading a pipe may block, a device may never end
            raise LoadError(f"{path} is a pipe or a device, not an image; remove it")
        try:
            with Image.open(path) as image:
                return image.convert(self.mode), self.labels[index]
        except Exception as error:  # PIL raises many kinds: OSError, SyntaxError, DecompressionBombError …
            raise LoadError(f"{path} is not an image that can be read ({error}); repair or remove it") from error


def read_folders(root: Path, source: Source, notes: list[str]) -> tuple[FolderImages, FolderImages | None]:
    """The images of `root/train` and of the held-out folder beside it; without `train`, all images of `root` and None.

    `source` gives the preprocessing. Sentences for the report are appended to `notes`. Raises LoadError if there is no
    held-out folder, no image, or a class that only one of the folders has.
    """
    train = root / "train"
    if not train.is_dir():
        return _read_folder(root, source, notes), None
    held_out = next((root / name for name in HELD_OUT_FOLDERS if (root / name).is_dir()), None)
    if held_out is None:
        raise LoadError(
            f"{root} has train/ but no held-out folder; add one of {', '.join(f'{n}/' for n in HELD_OUT_FOLDERS)}"
        )
    splits = _read_folder(train, source, notes), _read_folder(held_out, source, [])
    if splits[0].names != splits[1].names:
        differ = sorted(set(splits[0].names) ^ set(splits[1].names))
        raise LoadError(
            f"{train} and {held_out} have different classes: only one of them has {', '.join(differ[:4])}; give "
            "both the same class folders"
        )
    return splits


def _read_folder(root: Path, source: Source, notes: list[str]) -> FolderImages:
    """The images below `root`: one class per subfolder, or no labels if `root` itself holds the images."""
    from timm.data import create_transform
    from timm.data.readers.reader_image_folder import find_images_and_targets

    if source.size[0] not in MODES:
        raise LoadError(
            f"the model takes images of {source.size[0]} channels, and image files have 1 or 3; give an .npz file"
        )
    _require_tree(root)
    files, classes = find_images_and_targets(str(root), types=SUFFIXES)
    others = sum(path.is_file() and path.suffix.lower() not in SUFFIXES for path in root.rglob("*"))
    if others:
        notes.append(f"{others} files in {root.name}/ were left out, since they have no suffix of an image file")
    if list(classes) != sorted(classes):
        notes.append("classes are numbered in timm's order, folder 2 before folder 10; torchvision puts 10 before 2")
    if not files:
        raise LoadError(f"{root} has no images; give a folder of images, or one with a subfolder for each class")
    labelled = list(classes) != [""]
    transform = create_transform(
        source.size,
        is_training=False,
        interpolation=source.interpolation,
        mean=source.mean,
        std=source.std,
        crop_pct=source.crop_pct,
        crop_mode=source.crop_mode,
    )
    return FolderImages(
        paths=tuple(Path(path) for path, _ in files),
        labels=tuple(label if labelled else -1 for _, label in files),
        names=tuple(classes) if labelled else (),
        transform=transform,
        mode=MODES[source.size[0]],
    )


def _require_tree(root: Path) -> None:
    """Raises LoadError if a symbolic link leads back to a folder above it: timm would follow it some 40 times."""
    top = root.resolve()
    for folder, inner, _ in os.walk(root):
        for name in inner:
            link = Path(folder, name)
            if link.is_symlink() and (top.is_relative_to(link.resolve()) or link.resolve() in link.absolute().parents):
                raise LoadError(f"{root} contains a link to a folder above it: {link}; remove the link")
