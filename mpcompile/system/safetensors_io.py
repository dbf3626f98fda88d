"""Tensors as the bytes of a safetensors file: the same tensors and metadata are the same bytes, on every run.

The library writes metadata in the order of a hash map, which differs from run to run; here its keys are sorted.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mpcompile.errors import LoadError

ALIGNMENT_BYTES = 8  # where the format lets the tensors begin


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The content of a safetensors file."""
    from safetensors.torch import save

    # Cloned, since safetensors refuses tensors that share memory, as tied weights do.
    written = save({name: value.detach().clone().contiguous() for name, value in tensors.items()})
    end = 8 + int.from_bytes(written[:8], "little")
    rows = json.loads(written[8:end])
    header = json.dumps({"__metadata__": dict(sorted(metadata.items())), **rows}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % ALIGNMENT_BYTES)
    return b"".join((len(header).to_bytes(8, "little"), header, written[end:]))


def read_tensors(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a safetensors file. Raises LoadError."""
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except Exception as error:  # SafetensorError, and KeyError, RuntimeError … of headers that are JSON and no header
        raise LoadError(f"{path} is not a sound safetensors file: {error}") from error
    return tensors
