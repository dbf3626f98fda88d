"""Reads a file that gives the output index of each class: `--classes FILE`, `classes.txt` or `class_to_idx.json`."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mpcompile.errors import LoadError

IN_FOLDER = ("classes.txt", "class_to_idx.json")
MAX_BYTES = 10_000_000


def class_file_in(root: Path) -> Path | None:
    """The class file of a folder, or None. Raises LoadError if it has two that differ."""
    found = [root / name for name in IN_FOLDER if (root / name).is_file()]
    if len(found) > 1 and read_class_file(found[0]) != read_class_file(found[1]):
        raise LoadError(f"{found[0]} and {found[1]} give different classes; remove one, or give --classes")
    return found[0] if found else None


def read_class_file(path: Path) -> Mapping[str, int]:
    """Output index by class name. Raises LoadError.

    A text file has one class name a line, in the order of the outputs; a line such as `n01440764 tench` gives two names
    of one class. A JSON file is a list of names, a mapping of names to indices, or one of indices to names.
    """
    try:
        if not path.is_file():
            raise LoadError(
                f"{path} is no file; --classes takes a text file with one class name a line, or a JSON file"
            )
        if path.stat().st_size > MAX_BYTES:
            raise LoadError(f"{path} has {path.stat().st_size:,} bytes; a class file has at most {MAX_BYTES:,}")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise LoadError(f"{path} cannot be read: {error}") from error
    content = _json(text) if path.suffix.lower() == ".json" or text.lstrip().startswith(("{", "[")) else None
    try:
        pairs = _numbered_lines(text) if content is None else _numbered_json(content)
    except (TypeError, ValueError, RecursionError):
        pairs = []
    if not pairs or any(not name for name, _ in pairs):
        raise LoadError(
            f'{path} gives no classes; needed is one class name a line, or JSON such as {{"cat": 0, "dog": 1}}'
        )
    indices = [index for _, index in pairs]
    if min(indices) < 0:
        raise LoadError(f"{path} gives the class index {min(indices)}; needed are indices of the outputs, from 0")
    return _by_name(path, pairs)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return ()


def _numbered_lines(text: str) -> list[tuple[str, int]]:
    lines = [line.strip() for line in text.splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    pairs = [(line, index) for index, line in enumerate(lines)]
    synsets = [re.fullmatch(r"(n\d{8})[\s,]+(.+)", line) for line in lines]
    if lines and all(synsets):
        pairs = [(name, index) for index, match in enumerate(synsets) if match for name in match.groups()]
    return pairs


def _numbered_json(content: Any) -> list[tuple[str, int]]:
    if isinstance(content, list):
        return [(str(name), index) for index, name in enumerate(content) if isinstance(name, str)]
    if not isinstance(content, dict):
        return []
    if all(type(index) is int for index in content.values()):  # class_to_idx
        return list(content.items())
    pairs: list[tuple[str, int]] = []
    for key, names in content.items():  # id2label; ImageNet's index file gives two names for each
        pairs += [(str(name), int(key)) for name in ([names] if isinstance(names, str) else names)]
    return pairs


def _by_name(path: Path, pairs: Iterable[tuple[str, int]]) -> Mapping[str, int]:
    """Index by name; of names that stand for several classes, such as ImageNet's `crane`, none. Raises LoadError."""
    found: dict[str, int] = {}
    twice: set[str] = set()
    indices: dict[int, list[str]] = {}
    for name, index in pairs:
        if found.setdefault(name, index) != index:
            twice.add(name)
        indices.setdefault(index, []).append(name)
    unnamed = next((index for index, names in indices.items() if twice.issuperset(names)), None)
    if unnamed is not None:
        raise LoadError(f"{path} gives the class {sorted(twice)[0]!r} twice; needed is one index for each name")
    return {name: index for name, index in found.items() if name not in twice}
