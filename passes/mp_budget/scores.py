"""Budget signals: a saliency score for each weight, on one scale for all layers.

A signal gives every weight a score s ≥ 0. Removing the smallest scores of all layers together determines each layer's
density; the damage of removing a set is the sum of s² over it. Within a layer every signal here orders weights by
magnitude, so signals differ only in the density of each layer.

`mp` is Spectral Edge Budgeting (Berlyand et al., arXiv 2606.02608, Online Resource 2). For the overall sparsity s and a
layer ℓ with spectral quantity v(ℓ), standardised over the layers to z(ℓ),

    w(ℓ) = max(0.1, 1 + β d(s) z(ℓ)),    d(s) = max(0, 1 − s/s_d),    score = |W| / w(ℓ),

so a layer with a wide noise bulk is pruned more. v is the edge σ₊, or at low sparsity Hill's tail exponent. REGIMES has
β and s_d, which the paper tuned on 2,000 images for ViT-B.

Controls that `mp` must beat:

- `std`: the same formula with v = std(W) (√n + √p), which is σ₊ without any spectrum;
- `uniform`: the same density for every layer; the score is the weight's rank within its layer;
- `lamp`: W² over the sum of all W² of its layer that are at least as large (Lee et al., arXiv 2010.07611);
- `owl`: higher density for layers with more outliers |W| ‖x‖ (Yin et al., arXiv 2310.05175); needs images;
- `magnitude`: |W|, which is `mp` with w = 1 everywhere.

One more signal, better than `mp` in some benchmarks (benchmarks/results/budget.md):

- `sensitivity`: |W| a(ℓ)^½ with a(ℓ) from the derivatives of the logits (passes/mp_budget/sensitivity.py); needs
  images.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mpcompile.analysis.spectrum import Fit

Scores = dict[str, Float[Tensor, "out in_ *taps"]]

SMALLEST_FACTOR = 0.1
OUTLIER = 5.0  # times the mean of its layer; OWL's M
OWL_SPREAD = 0.08  # OWL's λ: the largest deviation of a layer's density from the mean


@dataclass(frozen=True, slots=True)
class Regime:
    """One row of the paper's table: the spectral quantity, β and s_d for sparsities up to `up_to`."""

    up_to: float
    quantity: Callable[[Fit], float]
    beta_attention: float
    beta_other: float
    vanishes_at: float  # s_d


def edge(fit: Fit) -> float:
    """σ₊, the singular value at which the fitted bulk ends."""
    return fit.bulk_edge


def tail_exponent(fit: Fit) -> float:
    """Hill's estimate of the exponent of the spectrum's upper tail."""
    return fit.tail_exponent


REGIMES = (
    Regime(0.20, tail_exponent, 0.50, 0.50, 0.30),
    Regime(0.40, edge, 1.00, 1.00, 0.50),
    Regime(0.55, edge, 1.25, 1.25, 0.70),
    Regime(1.00, edge, 1.00, 2.00, 0.85),
)


def regime(sparsity: float) -> Regime:
    """The row of the paper's table for this sparsity."""
    return next(row for row in REGIMES if sparsity <= row.up_to)


def factors(values: Mapping[str, float], attention: Collection[str], sparsity: float) -> dict[str, float]:
    """The factor w(ℓ) of each layer, from its quantity v(ℓ); 1 if all quantities are equal."""
    row = regime(sparsity)
    array = np.array(list(values.values()))
    spread = float(array.std()) if len(array) else 0.0
    damping = max(0.0, 1 - sparsity / row.vanishes_at)

    def factor(name: str, value: float) -> float:
        z = (value - float(array.mean())) / spread if spread > 0 else 0.0
        beta = row.beta_attention if name in attention else row.beta_other
        return max(SMALLEST_FACTOR, 1 + beta * damping * z)

    return {name: factor(name, value) for name, value in values.items()}


def spectral_edge(
    weights: Mapping[str, Tensor], fits: Mapping[str, Fit], attention: Collection[str], sparsity: float
) -> Scores:
    """The scores of `mp`. Layers without a fit have w = 1."""
    quantity = regime(sparsity).quantity
    known = {name: quantity(fits[name]) for name in weights if name in fits}
    w = factors({name: value for name, value in known.items() if np.isfinite(value)}, attention, sparsity)
    return {name: weight.abs() / w.get(name, 1.0) for name, weight in weights.items()}


def deviation_edge(weights: Mapping[str, Tensor], attention: Collection[str], sparsity: float) -> Scores:
    """The scores of `std`."""

    def size(weight: Tensor) -> float:
        rows, columns = weight.flatten(1).shape
        return float(weight.std()) * (math.sqrt(rows) + math.sqrt(columns))

    w = factors({name: size(weight) for name, weight in weights.items()}, attention, sparsity)
    return {name: weight.abs() / w[name] for name, weight in weights.items()}


def rank(weight: Float[Tensor, "out in_ *taps"]) -> Float[Tensor, "out in_ *taps"]:
    """Rank by magnitude within the layer divided by the number of weights, in (0, 1]. Ties: the earlier is lower."""
    flat = weight.abs().flatten()
    order = flat.argsort(stable=True)
    ranks = torch.empty_like(flat)
    ranks[order] = torch.arange(1, len(flat) + 1, dtype=flat.dtype) / len(flat)
    return ranks.reshape(weight.shape)


def lamp(weight: Float[Tensor, "out in_ *taps"]) -> Float[Tensor, "out in_ *taps"]:
    """The square root of the LAMP score, so that its square is the damage of removing the weight."""
    flat = weight.flatten().double().square()
    ascending, order = flat.sort(stable=True)
    at_least = ascending.flip(0).cumsum(0).flip(0)
    scores = torch.empty_like(flat)
    scores[order] = torch.where(ascending > 0, ascending / at_least, 0.0)
    return scores.sqrt().to(weight.dtype).reshape(weight.shape)


def outliers(weight: Tensor, scale: Tensor) -> float:
    """The share of a layer's products |W| ‖x‖ that exceed OUTLIER times their mean."""
    product = weight.abs().double() * scale
    return float((product > OUTLIER * product.mean()).double().mean())


def owl(weights: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> Scores:
    """The scores of `owl`: ranks, raised by up to 2 OWL_SPREAD in proportion to the layer's share of outliers."""
    shares = {name: outliers(weight, scales[name]) for name, weight in weights.items()}
    low, high = min(shares.values()), max(shares.values())
    raised = {
        name: 2 * OWL_SPREAD * (share - low) / (high - low) if high > low else 0.0 for name, share in shares.items()
    }
    return {name: rank(weight) + raised[name] for name, weight in weights.items()}


def sensitivity(weights: Mapping[str, Tensor], amplification: Mapping[str, float]) -> Scores:
    """The scores of `sensitivity`. The square root is used since derivatives overstate the loss at high sparsity."""
    return {name: weight.abs() * amplification[name] ** 0.5 for name, weight in weights.items()}
