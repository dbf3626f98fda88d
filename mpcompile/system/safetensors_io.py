"""Reads and writes safetensors files; the same tensors and metadata always give the same bytes.

The library writes metadata in hash-map order, which differs between runs. Here the keys are sorted.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mpcompile.errors import LoadError

ALIGNMENT_BYTES = 8  # of the start of the tensors, as the format requires


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file with these tensors and metadata.

    Each tensor is stored in full, even if two of them share memory.
    """
    from safetensors.torch import save

    # Cloned: safetensors refuses tensors that share memory, such as tied weights.
    written = save({name: value.detach().clone().contiguous() for name, value in tensors.items()})
    end = 8 + int.from_bytes(written[:8], "little")
    rows = json.loads(written[8:end])
    header = json.dumps({"__metadata__": dict(sorted(metadata.items())), **rows}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % ALIGNMENT_BYTES)
    return b"".join((len(header).to_bytes(8, "little"), header, written[end:]))


def read_tensors(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a safetensors file, by name. Raises LoadError if the file cannot be read."""
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except Exception as error:  # SafetensorError, and KeyError, RuntimeError … for JSON that is no safetensors header
        raise LoadError(f"{path} is not a valid safetensors file: {error}") from error
    return tensors
