"""Finished work of a long pass, kept in a folder, so that a run that was killed goes on where it stopped.

The folder (mpcompile/pipeline/run_folder.py) belongs to the context of the caller (`contextvars`), like the listener of
mpcompile.system.progress; where none was named, nothing is kept. What is in it is found again only by a run that would
compute the same: the name of a run is a hash of the pass, the model's weights, the patterns and every pixel of the
calibration images.
"""

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mpcompile.data.images import Split
from mpcompile.ir.model import Model
from mpcompile.system.safetensors_io import tensor_bytes

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ResultStore:
    """Where work is kept, and how much of the disk has to stay free for the output."""

    folder: Path
    reserve_bytes: int


_place: ContextVar[ResultStore | None] = ContextVar("place", default=None)


@contextmanager
def keeping(folder: Path, reserve_bytes: int = 0) -> Iterator[None]:
    """Inside, finished work is kept in the folder, as far as that leaves so much of the disk free."""
    token = _place.set(ResultStore(folder, reserve_bytes))
    try:
        yield
    finally:
        _place.reset(token)


def run_key(what: str, model: Model, plan: Mapping[str, object], images: Split) -> str:
    """A name for the run of a pass: the same for the same pass, weights, plan and images."""
    digest = hashlib.sha256(f"{what} {sorted((name, str(value)) for name, value in plan.items())}".encode())
    for name, value in sorted(model.graph.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().contiguous().numpy(force=True).tobytes())
    for pixels, _ in images.batches():
        digest.update(pixels.numpy().tobytes())
    return digest.hexdigest()[:32]


class PartialResults:
    """The tensors that a run has finished, by name; `key` is asked for only where work is kept."""

    def __init__(self, key: Callable[[], str]) -> None:
        place = _place.get()
        self._folder = None if place is None else place.folder / f"run-{key()}"
        self._reserve_bytes = 0 if place is None else place.reserve_bytes
        self._full = False

    def __contains__(self, name: str) -> bool:
        """Whether that part is finished."""
        return self._folder is not None and (self._folder / f"{name}.safetensors").is_file()

    def get(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of a finished part, or None."""
        from safetensors.torch import load_file

        if self._folder is None or name not in self:
            return None
        tensors: dict[str, Tensor] = load_file(self._folder / f"{name}.safetensors")
        return tensors

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps a part; a kill on the way leaves nothing that counts as finished.

        Where the disk has no room, nothing more is kept, and the run goes on.
        """
        if self._folder is None or self._full:
            return
        content = tensor_bytes(tensors, {})
        partial = self._folder / f"{name}.partial"
        try:
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self._folder.parent).free - len(content) < self._reserve_bytes:
                self._stop("the disk would have no room left for the output")
                return
            self._folder.mkdir(exist_ok=True)
            partial.write_bytes(content)
            partial.replace(self._folder / f"{name}.safetensors")
        except OSError as error:
            self._stop(error.strerror or str(error))
        finally:
            partial.unlink(missing_ok=True)

    def _stop(self, why: str) -> None:
        log.warning("what this pass finishes is no longer kept (%s): after a kill it is run again", why)
        self._full = True
