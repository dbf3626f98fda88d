"""The texts of errors about modules that cannot be copied or recorded: cause, line of model code, remedy."""

import traceback
from pathlib import Path

import torch
from torch import nn

# Hooks of torch that compute a parameter before each forward, by their class, and how to remove them.
HOOK_REMEDIES = {
    "WeightNorm": "torch.nn.utils.remove_weight_norm(layer)",
    "SpectralNorm": "torch.nn.utils.remove_spectral_norm(layer)",
    "BasePruningMethod": "torch.nn.utils.prune.remove(layer, 'weight')",
}
RECORDING_CODE = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


def copy_refusal(module: nn.Module, error: BaseException) -> str:
    """Why a module cannot be deep-copied: the layers with a hook that computes their weight, or torch's own text."""
    hooked: dict[str, list[str]] = {}
    for name, part in module.named_modules():
        for hook in part._forward_pre_hooks.values():
            kinds = [kind.__name__ for kind in type(hook).__mro__ if kind.__name__ in HOOK_REMEDIES]
            if kinds:
                hooked.setdefault(kinds[0], []).append(name or "the module itself")
    kind = type(module).__name__
    if not hooked:
        return f"{kind} cannot be deep-copied, so it cannot be captured safely: {error}"
    layers = [name for names in hooked.values() for name in names]
    listed = ", ".join(layers[:3]) + (", …" if len(layers) > 3 else "")
    remedies = " and ".join(HOOK_REMEDIES[hook] for hook in hooked)
    return (
        f"{kind} cannot be deep-copied: a hook computes a weight of {listed} before each forward. Make these "
        f"weights plain before the module is returned: {remedies} for each such layer"
    )


def record_refusal(module: nn.Module, error: BaseException) -> str:
    """Why a module that runs cannot be recorded: torch's reason, and the line of model code."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(RECORDING_CODE)]
    where = f"{own[-1].filename}:{own[-1].lineno}: `{own[-1].line}`" if own else "an unknown line"
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return (
        f"{type(module).__name__} runs, and cannot be captured: {reason}. At {where}. Keep the module around that line "
        "whole with --leaf NAME"
    )
