"""Folds a factor and biases of the logits into the weights and biases of the layers that compute them."""

import torch
from torch import Tensor

from mpcompile.ir.batch import Tensors
from mpcompile.ir.head import Head
from mpcompile.ir.model import Model
from mpcompile.ir.parity import relative_difference
from mpcompile.measure.confidence import as_logits
from mpcompile.passes.confidence.fit import LogitFit, pivot_of
from mpcompile.passes.confidence.logit_layers import LogitLayers, NotFoldable
from mpcompile.pipeline.pass_manager import EXACT_DRIFT

CLOSE = 1e-3  # of probabilities: those near 0 and 1 are rounded, and their logits with them


def require_foldable(model: Model, layers: LogitLayers, head: Head, biased: bool) -> None:
    """Raises NotFoldable if these layers cannot take a constant that the fit adds to the logits."""
    if not biased and pivot_of(head) == 0:
        return
    what = "biases of the logits" if biased else f"a factor around the threshold {head.threshold:g}"
    if layers.gain is None:
        raise NotFoldable(f"{what} cannot pass the operations between {layers.names[0]} and the logits")
    if model.layer(layers.names[0]).bias is None:
        raise NotFoldable(f"{layers.names[0]} has no bias, which {what} needs")


@torch.no_grad()
def fold(model: Model, layers: LogitLayers, fit: LogitFit, images: Tensors, head: Head) -> None:
    """Scales the layers in place, and checks on some images that the outputs are those of the fit.

    `head` is the one of the model's outputs. Raises NotFoldable, with the layers as they were, if the outputs differ.
    """
    before, of_logits = as_logits(model(images), head)
    require_foldable(model, layers, of_logits, fit.bias is not None)
    kept = {name: [value.clone() for value in _tensors(model, name)] for name in layers.names}
    for name in layers.names:
        for value in _tensors(model, name):
            value.copy_((fit.factor * value.double()).to(value.dtype))
    constant = torch.tensor((1 - fit.factor) * pivot_of(of_logits)).double()
    if fit.bias is not None:
        constant = constant + fit.bias
    if layers.gain is not None and bool(constant.any()):
        bias = _tensors(model, layers.names[0])[1]
        bias.copy_((bias.double() + constant / layers.gain).to(bias.dtype))
    wanted, found = fit.applied(before, of_logits), as_logits(model(images), head)[0].double()
    difference = _difference(wanted, found, of_logits, head.probabilities)
    if not difference <= (CLOSE if head.probabilities else EXACT_DRIFT):
        for name, values in kept.items():
            for value, old in zip(_tensors(model, name), values, strict=True):
                value.copy_(old)
        raise NotFoldable(
            f"with the factor in {' and '.join(layers.names)}, the outputs differ from the wanted ones by "
            f"{difference:.1e}"
        )


def _tensors(model: Model, name: str) -> list[Tensor]:
    """The weight of a layer, and its bias if it has one."""
    layer = model.layer(name)
    return [layer.weight] if layer.bias is None else [layer.weight, layer.bias]


def _difference(wanted: Tensor, found: Tensor, head: Head, probabilities: bool) -> float:
    """The largest difference: of probabilities, or of logits relative to the largest.

    A constant that is common to all outputs of an image does not matter for a softmax, and is left out.
    """
    if probabilities:
        sides = [z.softmax(1) if head.kind == "softmax" else z.sigmoid() for z in (wanted, found)]
        return float((sides[0] - sides[1]).abs().max())
    if head.kind == "softmax":
        wanted, found = (z - z.mean(1, keepdim=True) for z in (wanted, found))
    return relative_difference(wanted.numpy(force=True), found.numpy(force=True))
