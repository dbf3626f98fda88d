"""Samples of WebDataset shards, which are tar files on disk: read by their headers, images by their place in the file.

In a shard, files that follow each other with the same name up to the first dot of the file name are one sample:
`0001.jpg` and `0001.cls`. Memory holds names and places, and no image is read that is not used. The package webdataset
is not needed. It also opens addresses such as `pipe:…`, which run a command that a dataset gives.
"""

import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mpcompile.data.image_tree import SUFFIXES, shown
from mpcompile.errors import LoadError, first_line

LABEL = "cls"
USUAL = ("jpg", "png", "webp", "jpeg")  # of several images of a sample, timm takes the first of these


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a shard, by its place. `str()` names the shard and the file."""

    shard: Path
    name: str
    start: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard.name}/{self.name}"

    def read(self) -> bytes:
        """The bytes of the file. Raises LoadError if the shard has become shorter."""
        with self.shard.open("rb") as file:
            file.seek(self.start)
            content = file.read(self.size)
        if len(content) != self.size:
            raise LoadError(f"{self.shard} ends inside {self.name}; repair or remove it")
        return content

    def open(self, mode: str) -> io.BytesIO:
        """The bytes of the file."""
        return io.BytesIO(self.read())

    def version(self) -> str:
        """The place of the file, and size and modification time of the shard."""
        status = self.shard.stat() if self.shard.exists() else None  # reading a missing shard raises the error
        return f"{self} {self.start} {self.size} {status and (status.st_size, status.st_mtime_ns)}"

    def identity(self) -> str:
        """The place of the file in a shard of this name."""
        return f"{self} {self.start} {self.size}"


Sample = Mapping[str, Member]  # by suffix without the first dot, in lower case: jpg, cls, json


def samples_of(shard: Path) -> list[Sample]:
    """The samples of a shard in order, with their files. Raises LoadError."""
    samples: list[dict[str, Member]] = []
    last = None
    for member in _members(shard):
        path = PurePosixPath(member.name)
        stem, _, suffix = path.name.partition(".")
        if not stem or stem.startswith("__"):  # a hidden file, or metadata of the shard
            continue
        key = path.with_name(stem)
        if key != last or suffix.lower() in samples[-1]:
            samples.append({})
            last = key
        samples[-1][suffix.lower()] = member
    return list(samples)


def _members(shard: Path) -> Iterator[Member]:
    """The files of a shard. Raises LoadError."""
    try:
        with tarfile.open(shard, "r:") as archive:
            for info in archive:
                if info.isreg():
                    yield Member(shard, info.name, info.offset_data, info.size)
                archive.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
            _require_end(archive)
    except (tarfile.TarError, OSError, ValueError) as error:
        todo = "unpack it with gunzip: images are read by their place" if _is_packed(shard) else "repair or remove it"
        raise LoadError(f"{shard} cannot be read as a tar file ({first_line(error)}); {todo}") from error


def _require_end(archive: tarfile.TarFile) -> None:
    """Raises ReadError if no block of zeros follows the last file: tarfile takes a damaged header for the end."""
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"it is damaged or cut off at byte {archive.offset:,}")


def _is_packed(shard: Path) -> bool:
    """Whether a file is compressed with gzip."""
    if not shard.is_file():
        return False
    with shard.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def image_of(sample: Sample, suffix: str | None) -> Member | None:
    """The image of a sample: that of a suffix, or the first of the usual ones; None if it has none."""
    if suffix is not None:
        return sample.get(suffix.lower())
    found = [one for one in sample if f".{one.rpartition('.')[2]}" in SUFFIXES]
    return sample[min(found, key=lambda one: USUAL.index(one) if one in USUAL else len(USUAL))] if found else None


def label_of(sample: Sample, name: str | None) -> Any:
    """The class of a sample: its file `cls`, the file with the suffix `name`, or that field of its JSON file.

    None if it has none. Raises LoadError for a file that is no text or no JSON.
    """
    member = sample.get(name.lower() if name else LABEL)
    if member is not None:
        return _value(_text(member))
    described = sample.get("json")
    if name is None or described is None:
        return None
    try:
        fields = json.loads(_text(described))
    except ValueError as error:
        raise LoadError(f"{described} is no JSON: {first_line(error)}; repair or remove it") from error
    if not isinstance(fields, dict) or name not in fields:
        there = shown(fields, 12) if isinstance(fields, dict) else "no fields"
        raise LoadError(f"{described} has no field {name!r}; it has {there}")
    return fields[name]


def _text(member: Member) -> str:
    try:
        return member.read().decode("utf-8-sig").strip()
    except ValueError as error:
        raise LoadError(f"{member} is no text; name the label with ,label=SUFFIX behind the name") from error


def _value(text: str) -> int | str | None:
    """A class index, or else a name; None for an empty text."""
    try:
        return int(text)
    except ValueError:
        return text or None
