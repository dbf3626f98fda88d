"""SHA-256 of files, state dicts and values."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_sha256(module: nn.Module) -> str:
    """SHA-256 over names, shapes, types and bytes of a module's state dict and its extra state, in hexadecimal."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):  # what get_extra_state returned
            digest.update(f"{name}{value!r}".encode())
            continue
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sha256(*parts: str | bytes) -> str:
    """SHA-256 of a sequence of texts, in hexadecimal.

    Each text is hashed with its length, so that ("ab", "c") differs from ("a", "bc").
    """
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def sha256_of(tensor: Tensor) -> str:
    """SHA-256 of a tensor's type, shape and bytes, in hexadecimal."""
    value = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode())
    digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
