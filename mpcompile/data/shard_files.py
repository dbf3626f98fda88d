"""The shards of a WebDataset on disk, by split: from timm's `_info.json`, from names, or from a pattern."""

import json
import re
from collections.abc import Mapping, Sequence
from glob import escape, glob, has_magic
from pathlib import Path
from typing import Any

from mpcompile.data.dataset_name import DatasetName
from mpcompile.data.image_tree import by_number, shown
from mpcompile.data.split_folders import split_of
from mpcompile.errors import LoadError, UsageError, first_line

INFO = ("_info.json", "info.json")  # as timm names them
ALL = "all"  # the one split of shards whose names tell none
RANGE = re.compile(r"(\d+)\.\.(\d+)")
MOST_SHARDS = 1_000_000  # of one pattern

Shards = tuple[Path, ...]


def shards_by_split(dataset: DatasetName) -> Mapping[str, Shards]:
    """The shards of each split. A pattern of ,train= or ,held_out= is the name of its split. Raises LoadError."""
    if ":" in dataset.name.split("/")[0]:
        raise LoadError(f"{dataset} is not a path; wds/ reads shards on disk: download them and give their folder")
    root = Path(dataset.name)
    if _is_pattern(dataset.name):
        if dataset.train or dataset.held_out:
            raise UsageError(f"{dataset} names shards; give their folder, and patterns in it for train and held_out")
        return {ALL: _matching(dataset.name, dataset)}
    if not root.is_dir():
        raise LoadError(
            f"{dataset.name} is no folder; wds/ takes a folder of shards, or shards such as 'x-{{000..007}}.tar'"
        )
    given = [text for text in (dataset.train, dataset.held_out) if text is not None and _is_pattern(text)]
    patterns = {text: _matching(f"{escape(str(root))}/{text}", dataset) for text in given}
    if len(patterns) == 2 or (dataset.train in patterns and dataset.held_out is None):
        return patterns
    return {**_found(root, dataset), **patterns}


def _found(root: Path, dataset: DatasetName) -> dict[str, Shards]:
    """The shards of a folder by split. Raises LoadError."""
    for name in INFO:
        if (root / name).is_file():
            return _of_info(root / name)
    files = sorted((*root.glob("*.tar"), *root.glob("*/*.tar")), key=lambda path: by_number(str(path)))
    if not files:
        there = shown(sorted(path.name for path in root.iterdir())) or "nothing"
        raise LoadError(f"{dataset.name} has no shards (*.tar); it has {there}")
    splits: dict[str, list[Path]] = {}
    for path in files:
        splits.setdefault(_split_of_shard(path.relative_to(root)), []).append(path)
    if ALL in splits and len(splits) > 1:
        raise LoadError(
            f"{dataset.name} has shards of {shown(name for name in splits if name != ALL)}, and others whose names "
            f"tell no split ({shown(path.name for path in splits[ALL])}); give patterns: "
            ",train='x-*.tar',held_out='y-*.tar'"
        )
    return {name: tuple(paths) for name, paths in splits.items()}


def _split_of_shard(path: Path) -> str:
    """The split that the folder of a shard, or a word in its name, tells; ALL if none does."""
    words = [*path.parts[:-1], *re.split(r"[\W_]+", path.stem)]
    return next((word for word in words if split_of(word) is not None), ALL)


def _of_info(file: Path) -> dict[str, Shards]:
    """The shards that timm's description of a data set lists. Raises LoadError."""
    try:
        content: Any = json.loads(file.read_text("utf-8"))
        splits = {str(name): split["filenames"] for name, split in content["splits"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(
            f"{file} cannot be read: {type(error).__name__}: {first_line(error)}; needed is "
            '{"splits": {"train": {"filenames": […]}}}'
        ) from error
    return {name: _existing([str(file.parent / one) for one in files], str(file)) for name, files in splits.items()}


def _is_pattern(text: str) -> bool:
    return text.endswith(".tar") or "{" in text or has_magic(text)


def _matching(pattern: str, dataset: DatasetName) -> Shards:
    """The files that a pattern names: `{000..007}`, `{a,b}`, `*`, `?`, and several patterns joined by `::`."""
    files: list[str] = []
    for part in pattern.split("::"):
        for one in expanded(part):
            # Not Path.glob, which takes no absolute pattern.
            files += sorted(glob(one), key=by_number) if has_magic(one) else [one]  # noqa: PTH207
    if not files:
        raise LoadError(f"{dataset}: no file matches {pattern}")
    return _existing(files, str(dataset))


def _existing(files: Sequence[str], where: str) -> Shards:
    missing = [name for name in files if not Path(name).is_file()]
    if missing or not files:
        raise LoadError(f"{where} names {len(files):,} shards, and {len(missing):,} do not exist: {shown(missing)}")
    return tuple(map(Path, files))


def expanded(pattern: str) -> list[str]:
    """The texts of a pattern with braces, as a shell expands them: `{08..10}` is 08, 09, 10. Raises UsageError."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    numbers = RANGE.fullmatch(found[1])
    if numbers is None:
        parts = found[1].split(",")
    else:
        first, last = int(numbers[1]), int(numbers[2])
        if not first <= last < first + MOST_SHARDS:
            raise UsageError(
                f"{{{found[1]}}} gives {max(0, last - first + 1):,} shards; needed are 1 to {MOST_SHARDS:,}"
            )
        parts = [str(number).zfill(len(numbers[1])) for number in range(first, last + 1)]
    return [text for part in parts for text in expanded(pattern[: found.start()] + part + pattern[found.end() :])]
