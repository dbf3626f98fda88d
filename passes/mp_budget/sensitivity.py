"""The amplification of a layer's loss to the logits, from their derivatives on calibration images.

Removing a set R of weights from layer ℓ changes the logits z, to first order, by Σ_R w ∂z/∂w. If the signs of the
derivatives are independent, the mean square of that over images is Σ_R w² g², where g² = E ‖∂z/∂w‖². The squared
amplification of a whole layer is the mean of g² over its weights, weighted by w²:

    a(ℓ)² = Σ w² g² / Σ w².

‖∂z/∂w‖², a sum over outputs and over the images of a batch, is the mean of (∂(v·z)/∂w)² over random signs v. So one
backward pass for each batch gives an unbiased estimate (Hutchinson 1989). It is the diagonal of the Gauss–Newton matrix
of half the squared logit shift: Optimal Brain Damage (LeCun, Denker and Solla 1989) with the logits in place of the
loss.
"""

from collections.abc import Sequence

import torch

from mpcompile.data.images import Split
from mpcompile.ir.batch import arguments, primary
from mpcompile.ir.model import Model

BATCH = 32


def amplification(model: Model, images: Split, names: Sequence[str], seed: int = 0) -> dict[str, float]:
    """The amplification a(ℓ) of each layer; 0 if its weight is all zero or the logits do not depend on it."""
    weights = [model.layer(name).weight for name in names]
    needed = [weight.requires_grad for weight in weights]
    rng = torch.Generator("cpu").manual_seed(seed)  # the same numbers on every device
    sums = [0.0] * len(names)
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for inputs, _ in images.announced(BATCH):
            with torch.enable_grad():
                logits = primary(model.graph(*arguments(inputs, model.example.dtype)))
                signs = torch.randint(0, 2, logits.shape, generator=rng, device="cpu").to(logits) * 2 - 1
                slopes = torch.autograd.grad((logits * signs).sum(), weights, allow_unused=True)
            for index, (weight, slope) in enumerate(zip(weights, slopes, strict=True)):
                if slope is not None:
                    sums[index] += float((weight.detach().double() * slope.double()).square().sum())
    finally:
        for weight, was in zip(weights, needed, strict=True):
            weight.requires_grad_(was)
    sizes = [float(weight.detach().double().square().sum()) for weight in weights]
    return {
        name: (total / (size * len(images))) ** 0.5 if size else 0.0
        for name, total, size in zip(names, sums, sizes, strict=True)
    }
