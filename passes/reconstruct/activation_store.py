"""ActivationStore: the values of each batch at one point of a graph, in memory up to a limit, the rest in files.

Batches are visited one after another, again and again, as the run advances through the graph. While a batch is open its
values are in memory. When it is closed, they stay there if all values together are within the limit; else they are
written to a file of their own, which is read when the batch is opened again. The file holds the storages of the
tensors, byte for byte, so that sizes, strides and views that share memory are the same afterwards: a run with files
computes the same bits as one without.
"""

import tempfile
from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_map_only

from mpcompile.ir.placement import tensors_of
from mpcompile.system.memory import spill_folder, unused_bytes

Values = dict[Any, Any]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor's values lie in a file: its storage by number, and how the tensor views it."""

    storage: int
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _InFile:
    """Values of a batch in a file, with each tensor replaced by its _Place."""

    path: Path
    values: Values
    storage_bytes: tuple[int, ...]
    device: torch.device


class ActivationStore:
    """Values by batch. Use it in a `with` block, whose end removes the files.

    Args:
        limit_bytes: how many bytes of closed batches stay in memory; None for all.
        folder: an existing folder for the files.
        owned: addresses of storages that are never written to a file, such as those of weights.
    """

    def __init__(self, limit_bytes: int | None, folder: Path, owned: frozenset[int] = frozenset()) -> None:
        self._limit, self._parent, self._owned = limit_bytes, folder, owned
        self._values: dict[Hashable, Values | _InFile] = {}
        self._sizes: dict[Hashable, int] = {}  # of the closed batches in memory
        self._folder: Path | None = None
        self._stack = ExitStack()
        self._files = 0  # written so far
        self.file_bytes = 0  # that are in files now
        self.most_file_bytes = 0

    def __enter__(self) -> "ActivationStore":
        """The store."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Removes the files."""
        self._values.clear()
        self._stack.close()

    @contextmanager
    def opened(self, key: Hashable) -> Iterator[Values]:
        """The values of a batch, which the block may change; an empty dict the first time."""
        values = self._values.pop(key, {})
        self._sizes.pop(key, None)
        if isinstance(values, _InFile):
            values = self._read(values)
        yield values
        size = sum(len_bytes for _, len_bytes in self._storages(values).values())
        if self._limit is None or sum(self._sizes.values()) + size <= self._limit:
            self._values[key], self._sizes[key] = values, size
        else:
            self._values[key] = self._write(values)

    def _storages(self, values: Values) -> dict[int, tuple[torch.UntypedStorage, int]]:
        """The distinct storages of the tensors, by address, with their sizes in bytes; without the owned ones."""
        found = (one.untyped_storage() for one in tree_flatten(list(values.values()))[0] if isinstance(one, Tensor))
        return {s.data_ptr(): (s, s.nbytes()) for s in found if s.data_ptr() not in self._owned and s.nbytes()}

    def _write(self, values: Values) -> _InFile:
        storages = self._storages(values)
        number = {address: index for index, address in enumerate(storages)}
        if self._folder is None:
            self._folder = Path(
                self._stack.enter_context(tempfile.TemporaryDirectory(prefix="activations-", dir=self._parent))
            )
        device = next((storage.device for storage, _ in storages.values()), torch.device("cpu"))
        self._files += 1
        path = self._folder / str(self._files)
        with path.open("wb") as file:
            for storage, _ in storages.values():
                _bytes_of(storage.cpu()).tofile(file)

        def place(one: Tensor) -> object:
            storage = number.get(one.untyped_storage().data_ptr())
            if storage is None:
                return one
            return _Place(storage, one.dtype, int(one.storage_offset()), tuple(one.size()), one.stride())

        sizes = tuple(size for _, size in storages.values())
        self.file_bytes += sum(sizes)
        self.most_file_bytes = max(self.most_file_bytes, self.file_bytes)
        return _InFile(path, tree_map_only(Tensor, place, values), sizes, device)

    def _read(self, kept: _InFile) -> Values:
        with kept.path.open("rb") as file:
            storages = [_storage_of(np.fromfile(file, np.uint8, size), kept.device) for size in kept.storage_bytes]
        kept.path.unlink()
        self.file_bytes -= sum(kept.storage_bytes)

        def tensor(place: _Place) -> Tensor:
            empty = torch.empty(0, dtype=place.dtype, device=kept.device)
            return empty.set_(storages[place.storage], place.offset, place.size, place.stride)

        values: Values = tree_map_only(_Place, tensor, kept.values)
        return values


def activation_store(
    graphs: Sequence[fx.GraphModule], device: torch.device, reserved_bytes: int = 0
) -> ActivationStore:
    """A store for values of these graphs, in the memory of the device that the run may use, less what is reserved."""
    unused = unused_bytes(device)
    limit = None if unused is None else max(0, unused - reserved_bytes)
    owned = frozenset(tensor.untyped_storage().data_ptr() for graph in graphs for tensor in tensors_of(graph))
    return ActivationStore(limit, spill_folder(), owned)


def _bytes_of(storage: torch.UntypedStorage) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of a storage, without a copy."""
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage, 0, (storage.nbytes(),), (1,)).numpy()


def _storage_of(content: np.ndarray[Any, np.dtype[np.uint8]], device: torch.device) -> torch.UntypedStorage:
    """A storage on a device with these bytes."""
    return torch.from_numpy(content).to(device).untyped_storage()
