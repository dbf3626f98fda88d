"""Small .pt2 files, and files like them with one thing changed."""

import functools
import io
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim

PROGRAM = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
EXAMPLES = "data/sample_inputs/model.pt"


class Marks:
    """Unpickled, it creates a folder: a harmless stand-in for what a hostile pickle would do."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (self.marker,)


def small() -> nn.Module:
    """A convolution, a norm and a head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ).eval()


def saved(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, free: bool = False) -> bytes:
    """The bytes that torch.export.save writes for a module."""
    shapes = ({0: Dim("batch", min=1, max=64)},) if free else None
    file = io.BytesIO()
    torch.export.save(torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False), file)
    return file.getvalue()


@functools.cache
def small_file() -> bytes:
    """`small`, exported with a free batch."""
    return saved(small(), (torch.zeros(2, 3, 8, 8),), free=True)


@functools.cache
def fixed_file() -> bytes:
    """`small`, exported as users do: with the batch of the example."""
    return saved(small(), (torch.zeros(1, 3, 8, 8),))


def members_of(content: bytes) -> dict[str, bytes]:
    """The members of an archive, by their names without the root folder."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {entry.partition("/")[2]: archive.read(entry) for entry in archive.namelist()}


def archive_of(members: Mapping[str, bytes], root: str = "archive", compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip file with these members."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{root}/{name}", content)
    return file.getvalue()


def with_members(content: bytes, **changed: bytes) -> bytes:
    """An archive with more or other members; `data__weights__x` stands for data/weights/x."""
    return archive_of({**members_of(content), **{name.replace("__", "/"): value for name, value in changed.items()}})


def with_json(content: bytes, member: str, edit: Callable[[Any], object]) -> bytes:
    """An archive whose JSON member was edited in place."""
    members = members_of(content)
    value = json.loads(members[member])
    edit(value)
    return archive_of({**members, member: json.dumps(value).encode()})


def pickled(value: object) -> bytes:
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()
