"""Weights that a state dict stores in another form: computed to plain ones, or recognised as quantised."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

# Ends of names that only quantised modules have: torch.ao, bitsandbytes, GPTQ and AWQ.
QUANTIZED_ENDS = (
    "_packed_params", "_packed_params.dtype", ".zero_point", ".qweight", ".qzeros", ".SCB", ".quant_map", ".absmax",
)  # fmt: skip
# Beginnings of parts of names that only adapters have: LoRA, DoRA, AdaLoRA (PEFT and loralib).
ADAPTER_PARTS = ("lora_A", "lora_B", "lora_E", "lora_embedding_", "lora_magnitude_vector")


def quantized_entry(entries: Mapping[Any, Any]) -> str | None:
    """The first entry of a state dict that only a quantised model has, as text for an error; None if there is none."""
    for key, value in entries.items():
        parts = value if isinstance(value, tuple | list) else (value,)
        quantized = next((part for part in parts if isinstance(part, Tensor) and part.is_quantized), None)
        if quantized is not None:
            return f"{key} has the type {str(quantized.dtype).removeprefix('torch.')}"
        if isinstance(value, torch.dtype) or str(key).endswith(QUANTIZED_ENDS):
            return str(key)
    return None


def adapter_entry(names: Iterable[Any]) -> str | None:
    """The first name in a state dict that belongs to a LoRA adapter; None if there is none.

    PEFT and loralib write `lora_A` and `lora_B` beside the weights, and PEFT calls the weights themselves `base_layer`.
    """
    return next((str(name) for name in names if _of_adapter(str(name))), None)


def _of_adapter(name: str) -> bool:
    return any(part == "base_layer" or part.startswith(ADAPTER_PARTS) for part in name.split("."))


def plain_weights(entries: Mapping[Any, Any]) -> tuple[dict[Any, Any], tuple[str, ...]]:
    """The entries with each parametrized weight computed, and a sentence for each kind of parametrization.

    Known are torch.nn.utils.prune (original · mask) and weight_norm in its old and its new form (g · v / ‖v‖,
    Salimans and Kingma, arXiv 1602.07868).
    """
    plain, notes = dict(entries), []
    for first, name, second, compute, text in FORMS:
        found = []
        for key in [key for key in plain if isinstance(key, str) and re.fullmatch(first, key)]:
            weight, other = re.sub(first, name, key), re.sub(first, second, key)
            if weight not in plain and _is_float(plain[key]) and _is_float(plain.get(other)):
                try:
                    plain[weight] = compute(plain[key], plain[other])
                except RuntimeError:  # shapes that do not belong together; the mismatch is reported by name
                    continue
                del plain[key], plain[other]
                found.append(weight)
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            notes.append(f"{found[0]}{more} computed from {text}")
    return plain, tuple(notes)


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.layout is torch.strided


def _pruned(original: Tensor, mask: Tensor) -> Tensor:
    """The weight that torch.nn.utils.prune computes before each forward."""
    return original * mask


def _normalized(magnitude: Tensor, direction: Tensor) -> Tensor:
    """The weight g · v / ‖v‖, with the norm over all axes in which the magnitude has size 1."""
    axes = [axis for axis, size in enumerate(magnitude.shape) if size == 1]
    weight: Tensor = direction * (magnitude / torch.linalg.vector_norm(direction, dim=axes, keepdim=True))
    return weight


# The name of the first tensor, of the weight, and of the second tensor; how the weight is computed from both.
FORMS: tuple[tuple[str, str, str, Callable[[Tensor, Tensor], Tensor], str], ...] = (
    (r"(.*)_orig", r"\1", r"\1_mask", _pruned, "its original and its mask (torch.nn.utils.prune)"),
    (r"(.*)_g", r"\1", r"\1_v", _normalized, "its magnitude and direction (weight_norm)"),
    (
        r"(.*)parametrizations\.(\w+)\.original0",
        r"\1\2",
        r"\1parametrizations.\2.original1",
        _normalized,
        "its magnitude and direction (weight_norm)",
    ),
)
