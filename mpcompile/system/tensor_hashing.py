"""SHA-256 of tensors and state dicts."""

import hashlib

import torch
from torch import Tensor, nn


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


def sha256_of(tensor: Tensor) -> str:
    """SHA-256 of a tensor's type, shape and bytes, in hexadecimal."""
    value = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode())
    digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
