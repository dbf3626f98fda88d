"""Hashes of a model, images, code and versions. A checkpoint is used only if all hashes of its inputs are unchanged."""

import hashlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np

from mpcompile.data.encoded_images import DatasetImages
from mpcompile.data.folder import FolderImages
from mpcompile.data.images import Data, Split
from mpcompile.data.npz import ArrayImages
from mpcompile.ir.model import Model
from mpcompile.ir.structure import ADDRESS, structure_of, tensors_of
from mpcompile.system.hashing import sha256
from mpcompile.system.tensor_hashing import sha256_of

SAMPLED_IMAGES = 64  # how many images of a set are hashed if it consists neither of files nor of an array
RESULT_PACKAGES = ("torch", "numpy", "scipy", "timm")  # packages that results depend on, beside mpcompile


def model_key(model: Model) -> str:
    """The hash of a captured model: its structure and the values of its tensors."""
    hashes = sorted((name, sha256_of(value)) for name, value in tensors_of(model).items())
    return sha256(structure_of(model), repr(hashes))


def training_key(data: Data) -> str:
    """The hash of the calibration, validation and training images, which every pass may read.

    Calibration and validation images are hashed pixel by pixel; training images as in `images_key`.
    """
    hashed = [_pixels_key(split) for split in (data.calibration, data.validation)]
    return sha256(*hashed, images_key(data.training))


def images_key(split: Split) -> str:
    """The hash of a split without decoding all of its images.

    Images in a folder are hashed by file name, size and modification time, and by their labels; images of a dataset by
    their `version` and labels; images of an .npz file by their arrays; images of any other set by the pixels of the
    first SAMPLED_IMAGES.
    """
    images, order = split.images, split.order
    parts: list[str | bytes] = [repr((split.labelled, images.classes, len(order)))]
    if isinstance(images, ArrayImages):
        indices = list(order)
        parts += [repr((images.mean.tolist(), images.std.tolist(), images.channel_order))]
        parts += [repr(images.labels[indices].tolist())]
        parts += [repr(indices), hashlib.sha256(np.ascontiguousarray(images.pixels).data).hexdigest()]
    elif isinstance(images, FolderImages):
        parts += [ADDRESS.sub("", f"{images.transform!r} {images.mode} {images.reading!r}")]
        for index in order:
            path = images.paths[index]
            status = path.stat() if path.exists() else None  # the pass that reads a missing file raises the error
            version_of_file = (status.st_size, status.st_mtime_ns) if status else None
            # As bytes: a name may hold bytes that are not UTF-8.
            parts += [os.fsencode(f"{path.parent.name}/{path.name} {images.labels[index]} {version_of_file}")]
    elif isinstance(images, DatasetImages):
        parts += [ADDRESS.sub("", f"{images.transform!r} {images.mode} {images.reading!r}")]
        parts += [f"{images.paths[index].version()} {images.labels[index]}" for index in order]
    else:
        parts += [repr(order), _pixels_key(replace(split, order=order[:SAMPLED_IMAGES]))]
    return sha256(*parts)


def _pixels_key(split: Split) -> str:
    """The hash of every pixel and label of a split; images that were decoded before are not hashed again."""
    metric = () if split.metric is None else (split.metric.key(),)
    return sha256(repr((split.labelled, split.images.classes)), *metric, *split.hashes())


@cache
def code_key() -> str:
    """The hash of mpcompile's code: in an editable install the code may change while the version does not."""
    return source_key(Path(__file__).parents[1])


def source_key(package: Path) -> str:
    """The hash of every Python file below the folder `package`, except runtimes/, which no pass imports."""
    # Path.rglob does not follow links, and passes/ is one.
    folders = [package, package / "passes"]
    files = {file.relative_to(package).as_posix(): file for folder in folders for file in folder.rglob("*.py")}
    hashed = [name for name in sorted(files) if not name.startswith("runtimes/")]
    return sha256(*(part for name in hashed for part in (name, files[name].read_bytes())))


def versions() -> dict[str, str]:
    """The versions of the packages that results depend on; that of mpcompile with the hash of its code."""
    return {"mpcompile": f"{version('mpcompile')} {code_key()}", **{name: version(name) for name in RESULT_PACKAGES}}


def pass_key(step: object) -> str:
    """The hash of a pass (`step`): its class, the source file of the class, and its configuration."""
    kind = type(step)
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    code = Path(file).read_bytes() if file and Path(file).is_file() else b""
    return sha256(f"{kind.__module__}.{kind.__qualname__} {step!r}", code)


def facts_of(
    model: Model, data: Data, passes: Sequence[object], shows_held_out: Callable[[int], bool]
) -> list[dict[str, str]]:
    """For each pass, hashes of everything that its result depends on, by name.

    These are the versions, the model, the images, and the passes up to it. `shows_held_out` returns whether the pass
    at a position gets the held-out images; only then are they hashed.
    """
    common = versions() | {"the model": model_key(model), "the choice of images": training_key(data)}
    keys = {f"pass {number} ({_name(step)})": pass_key(step) for number, step in enumerate(passes, start=1)}
    held_out = {"the held-out images": images_key(data.held_out)}
    return [
        common | dict(list(keys.items())[: index + 1]) | (held_out if shows_held_out(index) else {})
        for index in range(len(passes))
    ]


def _name(step: object) -> str:
    return str(getattr(step, "name", type(step).__name__))


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> Sequence[str]:
    """The names of the facts that differ between two runs, such as `torch (2.7.0, now 2.8.0)` or `the model`."""
    names = []
    for name in dict.fromkeys([*now, *before]):
        old, new = before.get(name), now.get(name)
        if old != new:
            names.append(f"{name} ({old}, now {new})" if name in RESULT_PACKAGES and old and new else name)
    return names
