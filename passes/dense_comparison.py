"""A compressed model against the dense one: their outputs, the layers that differ, and each layer's share of it."""

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mpcompile.data.images import Split
from mpcompile.errors import PassError
from mpcompile.ir.model import Model
from mpcompile.passes.reconstruct.layerwise import sites_of

BATCH = 32


def outputs_of(graph: fx.GraphModule, images: Split) -> Tensor:
    """The graph's outputs for every image."""
    dtype = next((p.dtype for p in graph.parameters()), torch.float32)
    return torch.cat([graph(pixels.to(dtype)) for pixels, _ in images.batches(BATCH)])


def twin_of(model: Model, name: str) -> nn.Linear | nn.Conv2d:
    """The layer as it was before the first lossy pass. Raises PassError where there is none like it."""
    found = None if model.dense is None else dict(model.dense.named_modules()).get(name)
    if not isinstance(found, nn.Linear | nn.Conv2d) or found.weight.shape != model.layer(name).weight.shape:
        raise PassError(f"the dense model has no layer like {name}; a pass in between has rebuilt it")
    return found


def changed(model: Model) -> list[str]:
    """The layers whose weight or bias is no longer what it was."""
    names = []
    for name, layer in model.layers():
        old = twin_of(model, name)
        biased = old.bias is not None and layer.bias is not None and not torch.equal(old.bias, layer.bias)
        if biased or not torch.equal(old.weight, layer.weight):
            names.append(name)
    return names


def attribution(model: Model, images: Split) -> dict[str, float]:
    """Each changed layer's first-order share of the logits' squared shift.

    A batch normalisation that took up a layer's bias counts with that layer, any other by its own name.
    """
    assert model.dense is not None
    old, now = _tensors(model.dense), _tensors(model.graph)
    moved = {n: now[n] - value for n, value in old.items() if n in now and not torch.equal(value, now[n])}
    middle = {name: old[name] + delta / 2 for name, delta in moved.items()}
    # Statistics cannot be differentiated by, and act like the normalisation's own weight and bias:
    # y = γ (x − μ)/s + β, so dμ is −γ/s dβ, and dσ² is −γ/2s² dγ.
    as_if: dict[str, Tensor] = {}
    for name, module in model.dense.named_modules():
        if not isinstance(module, _BatchNorm) or not module.affine:
            continue
        mean, var = (moved.get(f"{name}.{part}") for part in ("running_mean", "running_var"))
        variance = middle.get(f"{name}.running_var", old.get(f"{name}.running_var"))
        if variance is None or (mean is None and var is None):
            continue
        gamma = middle.get(f"{name}.weight", old[f"{name}.weight"])
        if mean is not None:
            as_if[f"{name}.bias"] = -gamma * mean / (variance + module.eps).sqrt()
        if var is not None:
            as_if[f"{name}.weight"] = -gamma * var / (2 * (variance + module.eps))
    parameters = dict(model.dense.named_parameters())
    changes = {name: delta for name, delta in moved.items() if name in parameters}
    for name, delta in as_if.items():
        changes[name] = changes[name] + delta if name in changes else delta
    if not changes:  # what moved the logits, if anything did, was no weight
        return {}
    sloped = {name: middle.get(name, old[name]).requires_grad_(True) for name in changes}
    totals, power = dict.fromkeys(changes, 0.0), 0.0
    for pixels, _ in images.batches(BATCH):
        pixels = pixels.to(model.example.dtype)
        with torch.no_grad():
            shift = model.graph(pixels) - model.dense(pixels)
        with torch.enable_grad():
            logits = torch.func.functional_call(model.dense, {**old, **middle, **sloped}, (pixels,))
            slopes = torch.autograd.grad((logits * shift).sum(), list(sloped.values()), allow_unused=True)
        for (name, delta), slope in zip(changes.items(), slopes, strict=True):
            totals[name] += 0.0 if slope is None else float((slope.double() * delta.double()).sum())
        power += float(shift.double().square().sum())
    owner = _owners_of_norms(model)
    shares: dict[str, float] = {}
    for name, total in totals.items():
        module_name = name.rpartition(".")[0]
        at = owner.get(module_name, module_name)
        shares[at] = shares.get(at, 0.0) + (total / power if power else 0.0)
    return shares


def _owners_of_norms(model: Model) -> dict[str, str]:
    """The layer whose mean output each batch normalisation takes up."""
    names = {id(module): name for name, module in model.graph.named_modules()}
    sites = sites_of(model, changed(model))
    return {names[id(site.norm)]: site.names[0] for site in sites if site.norm is not None}


def _tensors(graph: fx.GraphModule) -> Mapping[str, Tensor]:
    """Parameters and buffers that are numbers with a fraction, detached."""
    named = [*graph.named_parameters(), *graph.named_buffers()]
    return {name: value.detach() for name, value in named if value.is_floating_point()}
