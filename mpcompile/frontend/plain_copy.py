"""Copies a module so that its layers hold plain weights: wrappers are taken off, computed weights are computed once.

torch.nn.utils.weight_norm, spectral_norm and prune, and every parametrization of torch.nn.utils.parametrize, compute a
weight from other tensors before each use. A mask on such a weight would be overwritten. The copy holds the value that
the module uses in evaluation mode as an ordinary parameter, under the name that the layer's class gives it.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.spectral_norm import remove_spectral_norm as _remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm
from torch.nn.utils.weight_norm import remove_weight_norm as _remove_weight_norm
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves

# What a note calls a parametrization. Others are called by their class.
SPOKEN = {"_WeightNorm": "weight_norm", "_SpectralNorm": "spectral_norm", "_Orthogonal": "orthogonal"}
Computed = tuple[nn.Module, str, str]  # the module, the name of its tensor, what computes it


def plain_copy(module: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """A copy of a module in evaluation mode with plain weights, and one sentence for each kind of computed weight.

    The copy computes what the module computes in evaluation mode. The module is not changed. Tensors that were computed
    from the same parameters to the same values are one parameter in the copy.
    """
    plain = copied(module).eval()
    names = {id(part): name for name, part in plain.named_modules()}
    kinds: dict[str, list[str]] = {}
    folded: list[tuple[list[int], nn.Parameter]] = []  # the parameters that a tensor was computed from, and the result
    with torch.no_grad():
        computed = [(*found, list(map(id, _originals(*found[:2])))) for found in computed_weights(plain)]
        for part, tensor, kind, origin in computed:
            kinds.setdefault(kind, []).append(".".join(filter(None, (names[id(part)], tensor))))
            _fold(part, tensor, kind)
            value = part._parameters.get(tensor)
            if value is None:  # it was computed from a buffer
                continue
            same = next((other for ids, other in folded if ids == origin and torch.equal(other, value)), None)
            part._parameters[tensor] = value if same is None else same
            folded.append((origin, value))
    return plain, tuple(_note(kind, tensors) for kind, tensors in kinds.items())


def copied(module: nn.Module) -> nn.Module:
    """A deep copy of a module, without wrappers.

    Wrappers are those of torch.compile, data parallelism and weight averaging, also around a part of the module. torch
    refuses to copy a tensor that a hook computed from parameters; its value is copied.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        stored = [value for name, value in vars(part).items() if name not in ("_modules", "_parameters")]
        for value in tree_leaves(stored):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    for part in reversed(list(module.modules())):  # the innermost first
        if (inner := wrapped(part)) is not None:
            memo[id(part)] = copy.deepcopy(inner, memo)
    whole: nn.Module = copy.deepcopy(module, memo)
    for part in whole.modules():
        for name in [name for name, value in vars(part).items() if _is_compiled_method(part, name, value)]:
            delattr(part, name)
    return whole


def wrapped(module: nn.Module) -> nn.Module | None:
    """The module that a wrapper holds and computes; None if it is no wrapper."""
    inner = getattr(module, "_orig_mod", None)
    if isinstance(inner, nn.Module):
        return inner
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel | AveragedModel):
        held: nn.Module = module.module
        return held
    return None


def _is_compiled_method(part: nn.Module, name: str, value: object) -> bool:
    """Whether an attribute is the compiled form of a method (`m.forward = torch.compile(m.forward)`).

    It is bound to the module that was compiled: a copy would run the weights of the original.
    """
    original = getattr(value, "_torchdynamo_orig_callable", None)
    method = getattr(type(part), name, None)
    return original is not None and getattr(original, "__qualname__", None) == getattr(method, "__qualname__", "")


def computed_weights(module: nn.Module) -> Iterator[Computed]:
    """Each tensor that torch computes from other parameters before it is used, and what computes it."""
    for part in module.modules():
        if parametrize.is_parametrized(part):
            tensors = part.parametrizations
            assert isinstance(tensors, nn.ModuleDict)
            for tensor, steps in tensors.items():
                kinds = [type(step).__name__ for step in steps.children()]
                yield part, tensor, " and ".join(SPOKEN.get(kind, kind) for kind in kinds)
        for hook in part._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm | SpectralNorm):
                yield part, hook.name, "weight_norm" if isinstance(hook, WeightNorm) else "spectral_norm"
            elif isinstance(hook, prune.BasePruningMethod):
                yield part, hook._tensor_name, "torch.nn.utils.prune"


def _originals(part: nn.Module, tensor: str) -> list[nn.Parameter]:
    """The parameters that a tensor is computed from."""
    if parametrize.is_parametrized(part, tensor):
        return list(part.parametrizations[tensor].parameters())  # type: ignore[index, union-attr]
    stored = (part._parameters.get(f"{tensor}_{end}") for end in ("orig", "g", "v"))
    return [value for value in stored if value is not None]


def _fold(part: nn.Module, tensor: str, kind: str) -> None:
    """Replaces a computed tensor by a parameter with its value; all of them if the part is parametrized."""
    if parametrize.is_parametrized(part):
        _fold_parametrized(part)
    elif tensor in part._parameters or tensor in part._buffers:
        return  # the part was parametrized
    elif kind == "weight_norm":
        _remove_weight_norm(part, tensor)
    elif kind == "spectral_norm":
        _remove_spectral_norm(part, tensor)
    else:
        _unshare(part, f"{tensor}_orig")
        prune.remove(part, tensor)


def _fold_parametrized(part: nn.Module) -> None:
    """Gives a parametrized module its first class back, with the computed tensors as parameters or buffers.

    `parametrize.remove_parametrizations` would change the class that the copy shares with the user's module.
    """
    lists: Any = part.parametrizations
    values = {}
    for tensor in lists:
        originals = list(lists[tensor].parameters(recurse=False))
        value = getattr(part, tensor).detach().clone()
        trained = any(original.requires_grad for original in originals)
        values[tensor] = nn.Parameter(value, trained) if originals else value
    del part.parametrizations
    part.__class__ = type(part).__bases__[0]
    for tensor, value in values.items():
        if isinstance(value, nn.Parameter):
            part.register_parameter(tensor, value)
        else:
            part.register_buffer(tensor, value)


def _unshare(part: nn.Module, name: str) -> None:
    """Replaces a parameter of a module by a copy: another module may share it, and torch writes into it."""
    shared = part._parameters[name]
    assert shared is not None
    part._parameters[name] = nn.Parameter(shared.detach().clone(), shared.requires_grad)


def _note(kind: str, tensors: list[str]) -> str:
    """A sentence on the tensors that one kind of computation gave."""
    listed = ", ".join(tensors[:3]) + (", …" if len(tensors) > 3 else "")
    plural = "tensors" if len(tensors) > 1 else "tensor"
    return f"{kind} computes {len(tensors)} {plural} before each use ({listed}); they are taken as plain weights"
