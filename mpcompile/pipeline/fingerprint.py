"""Hashes that tell whether a run would compute what an earlier one did: of a model, of images, of code."""

import hashlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
from torch import Tensor

from mpcompile.data.folder import FolderImages
from mpcompile.data.images import Data, Split
from mpcompile.data.npz import ArrayImages
from mpcompile.ir.model import Model
from mpcompile.system.hashing import sha256, sha256_of

SAMPLED_IMAGES = 64  # images whose pixels stand for a set that is too large to read and has no files to ask
COMPUTES = ("torch", "numpy", "scipy", "timm")  # what results depend on beside mpcompile
ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def tensors_of(model: Model) -> dict[str, Tensor]:
    """All tensors of a model by a name of their own: parameters and buffers, masks and orders of channels."""
    graph = model.graph
    named = (*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False))
    found: dict[str, Tensor] = {f"weight/{name}": value for name, value in named}
    for name, plan in model.plan.items():
        if plan.mask is not None:
            found[f"mask/{name}"] = plan.mask
        if plan.permutation is not None:
            found[f"permutation/{name}"] = plan.permutation
    return found


def structure_of(model: Model) -> str:
    """The hash of all that a model is but its numbers: nodes, modules, which weights are one, and its input."""
    # By any name: a path may be spelt in other ways, and the weights are told apart by their hash.
    lines = [f"{sha256_of(model.example)} {replace(model.source, name='')!r}"]
    for node in model.graph.graph.nodes:
        target = node.target
        if callable(target):
            target = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', repr(target))}"
        lines.append(f"{node.op} {node.name} {target} {node.args} {node.kwargs}")
    for name, module in model.graph.named_modules():
        lines.append(f"{name} {type(module).__module__}.{type(module).__qualname__} {module.extra_repr()}")
    first: dict[int, str] = {}
    for name, value in tensors_of(model).items():
        if name.startswith("weight/"):
            lines.append(f"{name} {first.setdefault(id(value), name)} {value.dtype} {tuple(value.shape)}")
    return sha256(*(ADDRESS.sub("", line) for line in lines))


def model_key(model: Model) -> str:
    """The hash of a model that no pass has seen yet."""
    hashes = sorted((name, sha256_of(value)) for name, value in tensors_of(model).items())
    return sha256(structure_of(model), repr(hashes))


def training_key(data: Data) -> str:
    """The hash of the images that every pass may see.

    Those for calibration and validation are read, to the pixel; those for training are told by their files.
    """
    read = [_pixels_key(split) for split in (data.calibration, data.validation)]
    return sha256(*read, images_key(data.training))


def images_key(split: Split) -> str:
    """The hash of a choice of images without reading them all: by their files, their arrays, or the first of them."""
    images, order = split.images, split.order
    parts: list[str | bytes] = [repr((split.labelled, images.classes, len(order)))]
    if isinstance(images, ArrayImages):
        chosen = list(order)
        parts += [repr((images.mean.tolist(), images.std.tolist(), images.labels[chosen].tolist()))]
        parts += [repr(chosen), hashlib.sha256(np.ascontiguousarray(images.pixels).data).hexdigest()]
    elif isinstance(images, FolderImages):
        parts += [ADDRESS.sub("", f"{images.transform!r} {images.mode}")]
        for index in order:
            path = images.paths[index]
            status = path.stat() if path.exists() else None  # one that has gone is told by the pass that reads it
            seen = (status.st_size, status.st_mtime_ns) if status else None
            parts += [f"{path.parent.name}/{path.name} {images.labels[index]} {seen}"]
    else:
        parts += [repr(order), _pixels_key(replace(split, order=order[:SAMPLED_IMAGES]))]
    return sha256(*parts)


def _pixels_key(split: Split) -> str:
    """The hash of every pixel and label."""
    parts: list[str | bytes] = [repr((split.labelled, split.images.classes))]
    for pixels, labels in split.batches():
        parts += [sha256_of(pixels), repr(labels.tolist())]
    return sha256(*parts)


@cache
def code_key() -> str:
    """The hash of mpcompile's own code, which an editable install may change without changing the version."""
    return source_key(Path(__file__).parents[1])


def source_key(package: Path) -> str:
    """The hash of every Python file of a package but its runtimes, which read what passes make; links are followed."""
    # Path.rglob does not follow links, and passes/ is one.
    folders = [package, package / "passes"]
    found = {file.relative_to(package).as_posix(): file for folder in folders for file in folder.rglob("*.py")}
    kept = [name for name in sorted(found) if not name.startswith("runtimes/")]
    return sha256(*(part for name in kept for part in (name, found[name].read_bytes())))


def versions() -> dict[str, str]:
    """The versions that results depend on."""
    return {"mpcompile": f"{version('mpcompile')} {code_key()}", **{name: version(name) for name in COMPUTES}}


def pass_key(step: object) -> str:
    """The hash of a pass: its class, the file that it is written in, and its configuration."""
    kind = type(step)
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    code = Path(file).read_bytes() if file and Path(file).is_file() else b""
    return sha256(f"{kind.__module__}.{kind.__qualname__} {step!r}", code)


def facts_of(
    model: Model, data: Data, passes: Sequence[object], shows_held_out: Callable[[int], bool]
) -> list[dict[str, str]]:
    """For each pass what its result follows from, by name: versions, model, images, the passes up to it."""
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
    """The names of the facts that differ; of versions, both."""
    told = []
    for name in dict.fromkeys([*now, *before]):
        old, new = before.get(name), now.get(name)
        if old != new:
            told.append(f"{name} ({old}, now {new})" if name in COMPUTES and old and new else name)
    return told
