"""Writes and reads model.safetensors and masks.safetensors of an output folder."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from mpcompile.errors import LoadError, MaskError, cause_of
from mpcompile.frontend.plain_copy import computed_weights, plain_copy
from mpcompile.frontend.stored_weights import layer_weight, stored_tensor, two_dimensional
from mpcompile.ir.model import LayerPlan, Model
from mpcompile.ir.pattern import NM
from mpcompile.system.safetensors_io import read_tensors, tensor_bytes

WEIGHTS, MASKS = "model.safetensors", "masks.safetensors"


def write_weights(folder: Path, module: nn.Module, model: Model) -> None:
    """Writes model.safetensors, under the original module's names, and masks.safetensors into `folder`.

    Computed weights (weight_norm and others) are written as plain ones, under the name that the layer's class gives
    them. A mask has the shape of the weight in model.safetensors. Raises MaskError if a masked or quantised layer is
    not in the module's state dict.
    """
    new = model.graph.state_dict()
    if any(True for _ in computed_weights(module)):
        module, _ = plain_copy(module)
    aliases = _aliases(module)
    weights: dict[str, torch.Tensor] = {}
    written: set[str] = set()  # the graph's tensors that are in `weights`
    for name, old in module.state_dict().items():
        if not isinstance(old, torch.Tensor):  # what get_extra_state returned
            continue
        weights[name] = old
        for alias in (name, *aliases.get(name, ())):
            value, parts = stored_tensor(alias, new, old.shape)
            if value is not None:
                weights[name] = value
                written.update(parts)
                break
    lost = [name for name in (*model.masks(), *model.scales()) if f"{name}.weight" not in written]
    if lost:
        raise MaskError(
            f"{lost[0]}: the state dict of {type(module).__name__} does not hold its weight, so {WEIGHTS} cannot; "
            "give a module whose state_dict() has all its parameters"
        )
    source = {"format": "pt", "arch": model.source.arch, "source_sha256": model.source.sha256}
    (folder / WEIGHTS).write_bytes(tensor_bytes(weights, source))
    patterns = {name: str(pattern) for name, pattern in model.patterns().items()}
    masks = {name: mask.reshape(_shape_of(name, weights, mask)) for name, mask in model.masks().items()}
    (folder / MASKS).write_bytes(tensor_bytes(masks, {"patterns": json.dumps(patterns)}))


def _shape_of(name: str, weights: Mapping[str, torch.Tensor], mask: torch.Tensor) -> torch.Size:
    """The shape that the weight of a layer has in model.safetensors; that of the mask if it has another name there."""
    weight = layer_weight(name, weights)
    return mask.shape if weight is None else weight.shape


def _aliases(module: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter and buffer, by each of its names.

    A module that is used under several names is in the graph under only one of them.
    """
    names: dict[int, list[str]] = {}
    for own in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)):
        for name, value in own:
            names.setdefault(id(value), []).append(name)
    return {name: same for same in names.values() for name in same}


def read_masks(path: Path) -> Mapping[str, LayerPlan]:
    """The pattern and mask of each layer in a masks.safetensors, by layer name. Raises LoadError."""
    from safetensors import safe_open

    masks = read_tensors(path)
    try:
        with safe_open(path, "pt") as file:
            patterns = json.loads((file.metadata() or {}).get("patterns", "{}"))
        parsed = {str(name): NM.parse(str(text)) for name, text in patterns.items()}
    except Exception as error:  # SafetensorError, or JSON that is not a table of patterns
        raise LoadError(f"{path}: the patterns in its metadata cannot be read: {cause_of(error)}") from error
    for name, mask in masks.items():
        if mask.dtype != torch.bool or mask.ndim < 2:
            kind = str(mask.dtype).removeprefix("torch.")
            raise LoadError(f"{path}: {name} is {kind} {tuple(mask.shape)}; a mask is bool, of 2 axes or more")
    return {name: LayerPlan(pattern=parsed.get(name), mask=mask) for name, mask in masks.items()}


def as_in_graph(
    plans: Mapping[str, LayerPlan], weights: Mapping[str, torch.Tensor]
) -> tuple[dict[str, LayerPlan], dict[str, torch.Tensor]]:
    """Plans and weights with the names and shapes of the graph, and so of the ONNX file."""
    own = {f"{name}.weight": layer_weight(name, weights) for name in plans}
    shaped = {name: two_dimensional(weight) for name, weight in own.items() if weight is not None}
    masks = {name: two_dimensional(plan.mask) for name, plan in plans.items() if plan.mask is not None}
    return {name: replace(plans[name], mask=mask) for name, mask in masks.items()}, {**weights, **shaped}
