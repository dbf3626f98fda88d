"""Results that a long pass saves while it runs, such as finished layers, so that a killed run resumes inside the pass.

They lie in the run's work folder (mpcompile/pipeline/run_folder.py), which `keeping` sets for the current context
(`contextvars`), as mpcompile.system.progress does with its listener. Without a folder nothing is saved. Each pass has a
subfolder, named by a hash of the pass, the model's weights, the patterns and every calibration image, so that only a
pass that would compute the same results loads them.
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
    """The folder for partial results, and how many bytes of its disk must stay free for the output."""

    folder: Path
    reserve_bytes: int


_current: ContextVar[ResultStore | None] = ContextVar("current", default=None)


@contextmanager
def keeping(folder: Path, reserve_bytes: int = 0) -> Iterator[None]:
    """Makes passes inside the block save partial results in `folder`.

    They stop saving when no more than `reserve_bytes` of the disk are free.
    """
    token = _current.set(ResultStore(folder, reserve_bytes))
    try:
        yield
    finally:
        _current.reset(token)


def run_key(pass_key: str, model: Model, plan: Mapping[str, object], images: Split) -> str:
    """A name for one execution of a pass: 32 hexadecimal digits, equal for equal pass, weights, plan and images."""
    digest = hashlib.sha256(f"{pass_key} {sorted((name, str(value)) for name, value in plan.items())}".encode())
    for name, value in sorted(model.graph.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().contiguous().numpy(force=True).tobytes())
    for image_hash in images.hashes():
        digest.update(image_hash.encode())
    return digest.hexdigest()[:32]


class PartialResults:
    """The tensors that one execution of a pass has saved, by the name of the finished part, usually a layer.

    `key` returns the execution's `run_key`; it is not called if nothing is saved, since hashing takes time. In a
    process group only rank 0 saves: the others pass False for `saves`.
    """

    def __init__(self, key: Callable[[], str], saves: bool = True) -> None:
        store = _current.get() if saves else None
        self._folder = None if store is None else store.folder / f"run-{key()}"
        self._reserve_bytes = 0 if store is None else store.reserve_bytes
        self._stopped = False

    def __contains__(self, name: str) -> bool:
        """Whether the part is finished and saved."""
        return self._folder is not None and (self._folder / f"{name}.safetensors").is_file()

    def get(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of a finished part, or None if it is not saved."""
        from safetensors.torch import load_file

        if self._folder is None or name not in self:
            return None
        tensors: dict[str, Tensor] = load_file(self._folder / f"{name}.safetensors")
        return tensors

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Saves a finished part. If the run is killed meanwhile, the part does not count as finished.

        If the disk has no room, a warning is logged, nothing more is saved, and the pass continues.
        """
        if self._folder is None or self._stopped:
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
        log.warning("results of this pass are no longer saved (%s); a killed run repeats the unsaved parts", why)
        self._stopped = True
