"""Compares a compressed model with the dense one: outputs, changed layers, each layer's share of the logits' shift."""

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mpcompile.data.images import Data, Split
from mpcompile.data.metric_values import mean_of
from mpcompile.errors import PassError
from mpcompile.ir.batch import arguments, primary
from mpcompile.ir.head import Head, head_for
from mpcompile.ir.model import Model
from mpcompile.passes.reconstruct.tied_weight import tied_weights
from mpcompile.system.device import CPU, makes_tensors_on
from mpcompile.system.distributed import shared_map

BATCH = 32
GRADIENT_BATCH = 8  # images whose intermediate values are kept for gradients
FIRST_IMAGE = "image {0[0]}".format  # the name of a batch in the progress


def outputs_of(graph: fx.GraphModule, images: Split) -> Tensor:
    """The graph's outputs for all images, (images, outputs). The caller disables gradients.

    In a process group, each rank runs its share of the batches.
    """
    dtype = next((p.dtype for p in graph.parameters()), torch.float32)

    def run(order: tuple[int, ...]) -> Tensor:
        return primary(graph(*arguments(images.inputs_of(order), dtype)))

    return torch.cat(shared_map(run, images.batch_orders(BATCH), FIRST_IMAGE, "images", len))


def dense_layer(model: Model, name: str) -> nn.Linear | nn.Conv2d:
    """The layer of this name in the dense model, which is the model before the first lossy pass.

    Raises PassError if the dense model has no layer of this name and weight shape.
    """
    layer = None if model.dense is None else dict(model.dense.named_modules()).get(name)
    if not isinstance(layer, nn.Linear | nn.Conv2d) or layer.weight.shape != model.layer(name).weight.shape:
        raise PassError(
            f"the dense model has no layer {name} with this weight shape, so a pass rebuilt the layer; keep names and "
            "shapes, or leave out restore and certify"
        )
    return layer


def measured_on(data: Data) -> Split:
    """The images on which losses are measured: validation images, or else calibration images."""
    return data.validation if len(data.validation) else data.calibration


def same_nodes(one: fx.GraphModule, other: fx.GraphModule) -> bool:
    """Whether two graphs have the same operations in the same order."""
    return [(n.op, n.target) for n in one.graph.nodes] == [(n.op, n.target) for n in other.graph.nodes]


def mean_shift(outputs: Tensor, dense: Tensor) -> float:
    """The mean over images of the largest change of a logit."""
    return float((outputs - dense).abs().flatten(1).amax(1).mean())


def shift_and_spread(outputs: Tensor, dense: Tensor) -> tuple[float, float]:
    """The means over images of the largest change of a logit, and of the range of the dense logits."""
    shift = mean_shift(outputs, dense)
    if dense.shape[1] == 1:  # an image has one logit, so the range is taken over the images
        return shift, float(dense.max() - dense.min())
    spread = (dense.flatten(1).amax(1) - dense.flatten(1).amin(1)).mean()
    return shift, float(spread)


def accuracy_drop(outputs: Tensor, dense: Tensor, images: Split, head: Head | None) -> float:
    """The drop of accuracy from the dense outputs, in percentage points; of the images' metric, in its units."""
    if images.metric is not None:
        sides: list[float] = []
        for rows in (dense, outputs):
            targets, parts = images.targets(BATCH), rows.cpu().split(BATCH)
            with makes_tensors_on(CPU):  # the metric is the user's own
                sides.append(mean_of([images.metric.of_batch(*pair) for pair in zip(parts, targets, strict=True)]))
        return sides[0] - sides[1]
    labels = torch.cat([labels for _, labels in images.batches()])
    decides = head_for(head, dense)
    before, after = (decides.right(z, labels).double().mean() for z in (dense, outputs))
    return float(100 * (before - after))


def changed_layers(model: Model) -> list[str]:
    """The qualified names of the layers whose weight or bias differs from the dense model's. Raises PassError.

    See `dense_layer` for the error.
    """
    names = []
    for name, layer in model.layers():
        old = dense_layer(model, name)
        biased = old.bias is not None and layer.bias is not None and not torch.equal(old.bias, layer.bias)
        if biased or not torch.equal(old.weight, layer.weight):
            names.append(name)
    return names


def attribution(model: Model, images: Split) -> dict[str, float]:
    """Each changed layer's first-order share of the logits' squared shift, by qualified name.

    The derivation is in passes/certify.py (Attribution). A batch normalization that absorbed a layer's mean shift
    counts with that layer; any other has a row of its own. The shares sum to about 1.
    """
    assert model.dense is not None
    old, now = _tensors(model.dense), _tensors(model.graph)
    deltas = {n: now[n] - value for n, value in old.items() if n in now and not torch.equal(value, now[n])}
    middle = {name: old[name] + delta / 2 for name, delta in deltas.items()}
    # There are no gradients for running statistics. Their changes are converted into changes of the normalization's
    # weight and bias: y = γ (x − μ)/s + β, so a change dμ acts like dβ = −γ/s dμ, and dσ² like dγ = −γ/(2s²) dσ².
    of_statistics: dict[str, Tensor] = {}
    for name, module in model.dense.named_modules():
        if not isinstance(module, _BatchNorm) or not module.affine:
            continue
        mean, var = (deltas.get(f"{name}.{part}") for part in ("running_mean", "running_var"))
        variance = middle.get(f"{name}.running_var", old.get(f"{name}.running_var"))
        if variance is None or (mean is None and var is None):
            continue
        gamma = middle.get(f"{name}.weight", old[f"{name}.weight"])
        if mean is not None:
            of_statistics[f"{name}.bias"] = -gamma * mean / (variance + module.eps).sqrt()
        if var is not None:
            of_statistics[f"{name}.weight"] = -gamma * var / (2 * (variance + module.eps))
    parameters = dict(model.dense.named_parameters())
    changes = {name: delta for name, delta in deltas.items() if name in parameters}
    for name, delta in of_statistics.items():
        changes[name] = changes[name] + delta if name in changes else delta
    if not changes:  # no weight changed
        return {}
    leaves = {name: middle.get(name, old[name]).requires_grad_(True) for name in changes}

    def of_batch(order: tuple[int, ...]) -> tuple[list[float], float]:
        """This batch's terms of the shares, one for each change, and of the squared shift."""
        assert model.dense is not None
        inputs = arguments(images.inputs_of(order), model.example.dtype)
        with torch.no_grad():
            shift = primary(model.graph(*inputs)) - primary(model.dense(*inputs))
        with torch.enable_grad():
            logits = primary(torch.func.functional_call(model.dense, {**old, **middle, **leaves}, inputs))
            gradients = torch.autograd.grad((logits * shift).sum(), list(leaves.values()), allow_unused=True)
        terms = [
            0.0 if gradient is None else float((gradient.double() * delta.double()).sum())
            for delta, gradient in zip(changes.values(), gradients, strict=True)
        ]
        return terms, float(shift.double().square().sum())

    batches = shared_map(of_batch, images.batch_orders(GRADIENT_BATCH), FIRST_IMAGE, "images", len)
    totals = {name: sum(terms[n] for terms, _ in batches) for n, name in enumerate(changes)}
    power = sum(squared for _, squared in batches)
    owner = _owners_of_norms(model)
    shares: dict[str, float] = {}
    for name, total in totals.items():
        module_name = name.rpartition(".")[0]
        layer_name = owner.get(module_name, module_name)
        shares[layer_name] = shares.get(layer_name, 0.0) + (total / power if power else 0.0)
    return shares


def _owners_of_norms(model: Model) -> dict[str, str]:
    """For each batch normalization that absorbs a changed layer's mean shift, by name, the layer's name."""
    names = {id(module): name for name, module in model.graph.named_modules()}
    weights = tied_weights(model, changed_layers(model))
    return {names[id(weight.norm)]: weight.names[0] for weight in weights if weight.norm is not None}


def _tensors(graph: fx.GraphModule) -> Mapping[str, Tensor]:
    """Floating-point parameters and buffers, detached, by name."""
    named = [*graph.named_parameters(), *graph.named_buffers()]
    return {name: value.detach() for name, value in named if value.is_floating_point()}
