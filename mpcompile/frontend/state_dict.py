"""Loads a state dict into a module by torch's own rules, and explains a mismatch."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpcompile.errors import LoadError
from mpcompile.frontend.plain_copy import copied
from mpcompile.frontend.weights_file import ALL_SHARDS, shard_of


def load_state(module: nn.Module, state: Mapping[str, Tensor], path: Path, arch: str) -> None:
    """Loads the weights into the module.

    torch's `load_state_dict` decides what fits: modules know the names of their older versions. In addition a buffer
    that the module does not save (persistent=False) may be in the file if its values are those of the module.

    Raises LoadError with the first few names of each kind of mismatch.
    """
    state = _without_unsaved_buffers(module, state)
    listed = mismatch(module, state)
    if listed and (shard := shard_of(path)):
        raise LoadError(f"{path} is {shard}, and holds only a part of the weights ({listed}); {ALL_SHARDS}")
    if listed:
        raise LoadError(f"{path} does not fit {arch}: {listed}. Check --arch and --arch-arg")
    module.load_state_dict(state)


def _without_unsaved_buffers(module: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The state dict without buffers that the module has, does not save, and holds with the same values."""
    saved = module.state_dict().keys()
    unsaved = {name: buffer for name, buffer in module.named_buffers() if name in state and name not in saved}
    equal = {name for name, buffer in unsaved.items() if _same_values(buffer, state[name])}
    if not equal:
        return state
    kept = copy.copy(state)  # with its _metadata
    for name in equal:
        del kept[name]  # type: ignore[attr-defined]
    return kept


def _same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two buffers have the same shape and values, up to the rounding of the coarser type."""
    if one.shape != other.shape or one.is_floating_point() != other.is_floating_point():
        return False
    if not one.is_floating_point():
        return bool(torch.equal(one.long(), other.long()))
    coarse = max(torch.finfo(one.dtype).eps, torch.finfo(other.dtype).eps)
    return bool(torch.allclose(one.float(), other.float(), rtol=2 * coarse, atol=1e-6))


def mismatch(module: nn.Module, state: Mapping[str, Tensor]) -> str | None:
    """How weights mismatch a module: the first few names of each kind; None if they fit. The module is not changed."""
    own = module.state_dict()
    shapes = [
        f"{name} {tuple(state[name].shape)} against {tuple(own[name].shape)}"
        for name in own
        if name in state and isinstance(own[name], Tensor) and state[name].shape != own[name].shape
    ]
    types = [
        f"{name} {str(state[name].dtype).removeprefix('torch.')}"
        for name in own
        if name in state
        and isinstance(own[name], Tensor)
        and own[name].is_floating_point()
        and not state[name].is_floating_point()
    ]
    missing, unexpected = _unmatched(module, own, state)
    kinds = (
        ("missing", missing),
        ("unexpected", unexpected),
        ("of another shape", shapes),
        ("not floating-point", types),
    )
    return "; ".join(f"{len(names)} {kind}: {_few(names)}" for kind, names in kinds if names) or None


def _unmatched(module: nn.Module, own: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Names that torch misses in a state dict, and names that it does not expect there."""
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    if not missing and not unexpected:
        return missing, unexpected
    try:
        trial = copied(module)  # loading with strict=False changes what fits
        found = trial.load_state_dict(state, strict=False)
    except (RuntimeError, AttributeError, KeyError, TypeError, ValueError):  # also for shapes, which are listed anyway
        return missing, unexpected
    return list(found.missing_keys), list(found.unexpected_keys)


def _few(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")
