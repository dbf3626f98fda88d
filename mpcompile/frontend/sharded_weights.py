"""Weights in several files, which an index such as `model.safetensors.index.json` lists."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mpcompile.errors import LoadError
from mpcompile.system.hashing import file_sha256, sha256

INDEX = ".index.json"


def is_index(path: Path) -> bool:
    """Whether a file is the index of several shards, by its name."""
    return path.name.endswith(INDEX)


def shards_of(index: Path) -> tuple[dict[str, str], tuple[Path, ...]]:
    """The file of each weight, by name, and the files in order. Raises LoadError for an index that cannot be used."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{index} is not readable JSON: {error}") from error
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise LoadError(f"{index} has no weight_map, which gives the file of each weight; save the model again")
    names = sorted(set(files.values()))
    if outside := [name for name in names if Path(name).name != name or name in ("", ".", "..")]:
        raise LoadError(f"{index} lists {outside[0]!r}, which is not a file beside it; it was not opened")
    paths = tuple(index.with_name(name) for name in names)
    if absent := [path.name for path in paths if not path.is_file()]:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise LoadError(f"{index} lists {absent[0]}{more}, which is not beside it; copy all {len(paths)} files")
    return files, paths


def read_shards(index: Path, read: Callable[[Path], Any]) -> Mapping[str, Tensor]:
    """The weights of all shards. `read` gives the content of one file. Raises LoadError if they are not as listed."""
    files, paths = shards_of(index)
    weights: dict[str, Tensor] = {}
    for path in paths:
        content = read(path)
        wanted = {name for name, file in files.items() if file == path.name}
        held = {name for name, value in content.items() if isinstance(value, Tensor)}
        if lacking := sorted(wanted - held):
            raise LoadError(f"{path} has no {lacking[0]}, which {index.name} lists there; save the model again")
        if unlisted := sorted(map(str, held - wanted)):
            raise LoadError(f"{path} holds {unlisted[0]}, which {index.name} does not list there; save the model again")
        weights |= {name: content[name] for name in wanted}
    return {name: weights[name] for name in files}


def weights_sha256(path: Path) -> str:
    """SHA-256 of a weights file, or of the SHA-256 of each file that an index lists, in hexadecimal."""
    return sha256(*map(file_sha256, shards_of(path)[1])) if is_index(path) else file_sha256(path)
