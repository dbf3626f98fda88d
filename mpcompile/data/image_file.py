"""Encoded image files that are not files of their own: rows of a dataset and members of a tar shard."""

import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable


@runtime_checkable
class ImageFile(Protocol):
    """An encoded image. `str()` gives the name that errors print, without the folders of this machine."""

    def open(self, mode: str) -> io.BytesIO:
        """The encoded bytes, from the first. Raises LoadError or OSError."""
        ...

    def version(self) -> str:
        """A text that changes if the image changes. Decodes nothing."""
        ...

    def identity(self) -> str:
        """A text that is the same on every machine that has the image, and on no machine that has another there."""
        ...


Readable = Path | ImageFile


@dataclass(frozen=True, slots=True)
class BytesImage:
    """An encoded image that is held in memory."""

    name: str
    content: bytes = field(repr=False)

    def __str__(self) -> str:
        return self.name

    def open(self, mode: str) -> io.BytesIO:
        """The encoded bytes."""
        return io.BytesIO(self.content)

    def version(self) -> str:
        """The hash of the encoded bytes."""
        return f"{self.name} {hashlib.sha256(self.content).hexdigest()}"

    def identity(self) -> str:
        """The same as `version`."""
        return self.version()
