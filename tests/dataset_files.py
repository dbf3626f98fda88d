"""Small datasets that tests write: tar shards of images and labels."""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIDE = 12


def picture(number: int) -> Image.Image:
    """An image whose pixels tell its number."""
    return Image.fromarray(np.full((SIDE, SIDE + 4, 3), number % 256, np.uint8))


def encoded(number: int, suffix: str = "png") -> bytes:
    """An image as the bytes of a file."""
    buffer = io.BytesIO()
    picture(number).save(buffer, {"jpg": "JPEG"}.get(suffix, suffix.upper()))
    return buffer.getvalue()


def write_shard(path: Path, files: Iterable[tuple[str, bytes]], mode: str = "w") -> Path:
    """A tar file of these files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def sample(number: int, label: object, suffix: str = "png") -> list[tuple[str, bytes]]:
    """The files of a sample with a class."""
    return [(f"{number:05}.{suffix}", encoded(number, suffix)), (f"{number:05}.cls", str(label).encode())]


def write_shards(root: Path, names: Iterable[str], each: int, classes: int = 10) -> None:
    """Shards of `each` samples, numbered through; the class of a sample is its number modulo `classes`."""
    for index, name in enumerate(names):
        numbers = range(index * each, (index + 1) * each)
        write_shard(root / name, [file for number in numbers for file in sample(number, number % classes)])


def write_info(root: Path, splits: Mapping[str, list[str]]) -> None:
    """Timm's description of a dataset of shards."""
    content: dict[str, Any] = {"splits": {name: {"name": name, "filenames": files} for name, files in splits.items()}}
    (root / "_info.json").write_text(json.dumps(content))
