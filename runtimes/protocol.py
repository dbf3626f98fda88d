"""What a runtime and an engine are: the two protocols that every file beside this one fulfils."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mpcompile.lower import Lowered
from mpcompile.model import NM


@runtime_checkable
class Engine(Protocol):
    """A model that runs: the harness times this call and compares what it returns."""

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits (b, outputs) of images (b, c, h, w), both float32."""
        ...

    def layers(self) -> Sequence[Mapping[str, Any]]:
        """A row a layer of what the engine will really execute, as far as the runtime tells."""
        ...

    @property
    def device(self) -> str:
        """What it runs on, for people to read."""
        ...


@runtime_checkable
class Runtime(Protocol):
    """Something that executes models, whether or not it is installed here."""

    name: ClassVar[str]
    accelerates: ClassVar[frozenset[NM]]  # the patterns that it has kernels for; any other runs as dense

    def missing(self) -> str | None:
        """What to install to use it here, or None: the one text for the command line, `doctor` and the tests."""
        ...

    def refuses(self, precision: str, threads: int | None) -> str | None:
        """Why it cannot run so, or None: nothing that was asked for is left out silently."""
        ...

    def versions(self) -> Mapping[str, str]:
        """The versions of the software that decides how fast it is."""
        ...

    def build(self, lowered: Lowered, threads: int | None = None) -> Engine:
        """An engine for a model. Raises RuntimeMissing or BuildError."""
        ...
