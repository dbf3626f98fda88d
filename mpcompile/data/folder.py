"""A folder of images, a subfolder a class -> images that are decoded when they are asked for."""

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
    """Image files through timm's evaluation transform."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    names: tuple[str, ...]
    transform: Callable[[Any], Tensor]
    mode: str

    @property
    def classes(self) -> int:
        return len(self.names)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture, label = self.picture(index)
        return self.transform(picture), label

    def picture(self, index: int) -> tuple[Any, int]:
        """The image as it is in its file."""
        from PIL import Image

        path = self.paths[index]
        if path.exists() and not path.is_file():  # a pipe would be waited for, a device never ends
            raise LoadError(f"{path} is a pipe or a device, and no image; remove it")
        try:
            with Image.open(path) as image:
                return image.convert(self.mode), self.labels[index]
        except Exception as error:  # PIL raises many kinds: OSError, SyntaxError, DecompressionBombError …
            raise LoadError(f"{path} is not an image that can be read ({error}); mend or remove it") from error


def read_folders(root: Path, source: Source, notes: list[str]) -> tuple[FolderImages, FolderImages | None]:
    """The images of `train/` and a held-out folder beside it, or of one folder; adds what is to be known of them."""
    train = root / "train"
    if not train.is_dir():
        return _read_folder(root, source, notes), None
    held_out = next((root / name for name in HELD_OUT_FOLDERS if (root / name).is_dir()), None)
    if held_out is None:
        raise LoadError(f"{root} has train/ and none of {', '.join(f'{n}/' for n in HELD_OUT_FOLDERS)} to evaluate on")
    splits = _read_folder(train, source, notes), _read_folder(held_out, source, [])
    if splits[0].names != splits[1].names:
        differ = sorted(set(splits[0].names) ^ set(splits[1].names))
        raise LoadError(f"{train} and {held_out} have different classes: {', '.join(differ[:4])} in only one of them")
    return splits


def _read_folder(root: Path, source: Source, notes: list[str]) -> FolderImages:
    """The images of a folder per class, or of one folder without classes."""
    from timm.data import create_transform
    from timm.data.readers.reader_image_folder import find_images_and_targets

    if source.size[0] not in MODES:
        raise LoadError(
            f"the model takes images of {source.size[0]} channels; files give 1 or 3, an .npz file any number"
        )
    _require_tree(root)
    found, classes = find_images_and_targets(str(root), types=SUFFIXES)
    others = sum(path.is_file() and path.suffix.lower() not in SUFFIXES for path in root.rglob("*"))
    if others:
        notes.append(f"{others} files in {root.name}/ are not images by their suffix, and were left out")
    if list(classes) != sorted(classes):
        notes.append("classes are numbered as timm sorts their folders, 2 before 10; torchvision sorts them otherwise")
    if not found:
        raise LoadError(f"{root} holds no images; needed is a folder per class, or a folder of images")
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
        paths=tuple(Path(path) for path, _ in found),
        labels=tuple(label if labelled else -1 for _, label in found),
        names=tuple(classes) if labelled else (),
        transform=transform,
        mode=MODES[source.size[0]],
    )


def _require_tree(root: Path) -> None:
    """Raises where links make a folder part of itself: timm follows them, some forty deep."""
    home = root.resolve()
    for folder, inner, _ in os.walk(root):
        for name in inner:
            link = Path(folder, name)
            if link.is_symlink() and (home.is_relative_to(link.resolve()) or link.resolve() in link.absolute().parents):
                raise LoadError(f"{root} holds itself: a link in it leads back, {link}; remove it")
