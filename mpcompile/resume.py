"""Finished work of a long pass, kept in a folder, so that a run that was killed goes on where it stopped.

The folder belongs to the context of the caller (`contextvars`), like the listener of mpcompile.progress; where none was
named, nothing is kept. What is in it is found again only by a run that would compute the same: the name of a run is a
hash of the pass, the model's weights, the patterns and every pixel of the calibration images.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from torch import Tensor

from mpcompile.data import Split
from mpcompile.errors import UsageError
from mpcompile.model import Model

_folder: ContextVar[Path | None] = ContextVar("folder", default=None)


@contextmanager
def keeping(folder: Path | None) -> Iterator[None]:
    """Inside, finished work is kept in the folder; it is removed when all went well. Raises UsageError."""
    if folder is None:
        yield
        return
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; --resume names a folder")
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)
    for run in folder.glob("run-*"):
        shutil.rmtree(run)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def run_key(what: str, model: Model, plan: Mapping[str, object], images: Split) -> str:
    """A name for the run of a pass: the same for the same pass, weights, plan and images."""
    digest = hashlib.sha256(f"{what} {sorted((name, str(value)) for name, value in plan.items())}".encode())
    for name, value in sorted(model.graph.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().contiguous().numpy(force=True).tobytes())
    for pixels, _ in images.batches():
        digest.update(pixels.numpy().tobytes())
    return digest.hexdigest()[:32]


class Finished:
    """The tensors that a run has finished, by name; `key` is asked for only where work is kept."""

    def __init__(self, key: Callable[[], str]) -> None:
        folder = _folder.get()
        self._folder = None if folder is None else folder / f"run-{key()}"
        if self._folder is not None:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(f"{self._folder} cannot be made: {error.strerror}") from error

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
        """Keeps a part; a kill on the way leaves nothing that counts as finished."""
        from safetensors.torch import save_file

        if self._folder is None:
            return
        partial = self._folder / f"{name}.partial"
        # Cloned, since safetensors refuses tensors that share memory, as tied weights do.
        save_file({key: value.detach().clone().contiguous() for key, value in tensors.items()}, partial)
        partial.replace(self._folder / f"{name}.safetensors")
