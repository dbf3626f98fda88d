"""Loads a state dict into a module: removes wrapper prefixes, and explains a mismatch."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from mpcompile.errors import LoadError

PREFIXES = ("module.", "model.", "_orig_mod.")


def without_prefixes(state: Mapping[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """The state dict without the wrapper prefixes that all its keys share.

    A prefix stays if more keys match `wanted` with it than without it.
    """
    best = dict(state)
    while (prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in best)), None)) is not None:
        shorter = {name.removeprefix(prefix): value for name, value in best.items()}
        if len(wanted & best.keys()) > len(wanted & shorter.keys()):
            break
        best = shorter
    return best


def load_state(module: nn.Module, state: Mapping[str, Tensor], path: Path, arch: str) -> None:
    """Loads the weights into the module. Raises LoadError with the first few keys of each kind of mismatch."""
    state = without_prefixes(state, set(module.state_dict()))
    if listed := mismatch(module, state):
        raise LoadError(f"{path} does not fit {arch}: {listed}. Check --arch and --arch-arg")
    module.load_state_dict(state)


def mismatch(module: nn.Module, state: Mapping[str, Tensor]) -> str | None:
    """How weights mismatch a module: the first few names of each kind; None if they fit."""
    own = module.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{name} {tuple(state[name].shape)} against {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    types = [
        f"{name} {str(state[name].dtype).removeprefix('torch.')}"
        for name in own
        if name in state and own[name].is_floating_point() and not state[name].is_floating_point()
    ]
    kinds = (
        ("missing", missing),
        ("unexpected", unexpected),
        ("of another shape", shapes),
        ("not floating-point", types),
    )
    return "; ".join(f"{len(names)} {kind}: {_few(names)}" for kind, names in kinds if names) or None


def _few(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")
