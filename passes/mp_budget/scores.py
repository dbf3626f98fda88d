"""Budget signals: what each weight is worth, on one scale for all layers.

A budget is a score s ≥ 0 for every weight. Removing the smallest of all layers together until a share remains gives
each layer its density; removing a set costs the sum of s² over it. Within a layer every signal here orders weights by
magnitude, so signals differ in how they share out density between layers, and in nothing else.

`mp` is Spectral Edge Budgeting (Berlyand et al., arXiv 2606.02608, Online Resource 2). For the sparsity s of the whole
and a layer ℓ with spectral quantity v(ℓ), standardised over the layers to z(ℓ),

    w(ℓ) = max(0.1, 1 + β d(s) z(ℓ)),    d(s) = max(0, 1 − s/s_d),    score = |W| / w(ℓ),

so a layer with a wide noise bulk is pruned more. v is the edge σ₊, or at low sparsity Hill's tail exponent, and
REGIMES gives β and s_d, which the paper tuned on 2,000 images for ViT-B.

The others are the controls that it has to beat:

- `std`: the same formula with v = std(W) (√n + √p), which is σ₊ without any spectrum;
- `uniform`: every layer the same density; the score is the weight's rank within its layer;
- `lamp`: W² over the sum of all W² of its layer that are at least as large (Lee et al., arXiv 2010.07611);
- `owl`: more density for layers in which more inputs stand out (Yin et al., arXiv 2310.05175); needs images;
- `magnitude`: |W|, which is `mp` with w = 1 everywhere.

And one that is not a control but the better signal where the benchmark says so:

- `sensitivity`: |W| a(ℓ)^½ with a(ℓ) from the logits' own derivatives (passes/mp_budget/sensitivity.py); needs images.
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
OWL_SPREAD = 0.08  # OWL's λ: how far a layer's density may be from the mean


@dataclass(frozen=True, slots=True)
class Regime:
    """How the paper sets the formula up to a sparsity: which quantity, and its β and s_d."""

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
    """The regime of the paper's table that a sparsity falls into."""
    return next(row for row in REGIMES if sparsity <= row.up_to)


def factors(values: Mapping[str, float], attention: Collection[str], sparsity: float) -> dict[str, float]:
    """w(ℓ) for each layer of which the quantity is known; where all are equal, 1."""
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
    """`mp`. Layers without a fit have w = 1."""
    quantity = regime(sparsity).quantity
    known = {name: quantity(fits[name]) for name in weights if name in fits}
    w = factors({name: value for name, value in known.items() if np.isfinite(value)}, attention, sparsity)
    return {name: weight.abs() / w.get(name, 1.0) for name, weight in weights.items()}


def deviation_edge(weights: Mapping[str, Tensor], attention: Collection[str], sparsity: float) -> Scores:
    """`std`."""

    def size(weight: Tensor) -> float:
        rows, columns = weight.flatten(1).shape
        return float(weight.std()) * (math.sqrt(rows) + math.sqrt(columns))

    w = factors({name: size(weight) for name, weight in weights.items()}, attention, sparsity)
    return {name: weight.abs() / w[name] for name, weight in weights.items()}


def rank(weight: Float[Tensor, "out in_ *taps"]) -> Float[Tensor, "out in_ *taps"]:
    """The share of the layer's weights that are no larger, in (0, 1]; of equal ones the earlier is the smaller."""
    flat = weight.abs().flatten()
    order = flat.argsort(stable=True)
    ranks = torch.empty_like(flat)
    ranks[order] = torch.arange(1, len(flat) + 1, dtype=flat.dtype) / len(flat)
    return ranks.reshape(weight.shape)


def lamp(weight: Float[Tensor, "out in_ *taps"]) -> Float[Tensor, "out in_ *taps"]:
    """The root of the LAMP score, so that its square is what removing costs."""
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
    """`owl`: ranks, raised by up to 2 OWL_SPREAD with the layer's share of outliers."""
    shares = {name: outliers(weight, scales[name]) for name, weight in weights.items()}
    low, high = min(shares.values()), max(shares.values())
    raised = {
        name: 2 * OWL_SPREAD * (share - low) / (high - low) if high > low else 0.0 for name, share in shares.items()
    }
    return {name: rank(weight) + raised[name] for name, weight in weights.items()}


def sensitivity(weights: Mapping[str, Tensor], amplification: Mapping[str, float]) -> Scores:
    """`sensitivity`. The root is because the derivative overstates what a layer loses when much of it goes."""
    return {name: weight.abs() * amplification[name] ** 0.5 for name, weight in weights.items()}
