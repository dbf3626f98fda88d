"""The mask of an N:M pattern: the N largest scores of each group of M, and a check that a weight keeps to it."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mpcompile.ir.pattern import NM
from mpcompile.ir.weight_groups import grouped, ungrouped
from mpcompile.passes.reconstruct.layerwise import Layer


def nm_mask(score: Float[Tensor, "out in_ *taps"], pattern: NM) -> Bool[Tensor, "out in_ *taps"]:
    """True where a weight is kept: the `keep` highest scores of every `of`; of equal scores the first."""
    groups = grouped(score, pattern.of)
    shared = groups.reshape(-1, pattern.rows, *groups.shape[1:]).sum(1, dtype=torch.float64)
    # A stable sort, because topk does not say which of two equal scores it takes.
    best = shared.sort(dim=-1, descending=True, stable=True).indices[..., : pattern.keep]
    kept = torch.zeros_like(shared, dtype=torch.bool).scatter_(-1, best, True)
    return ungrouped(kept.repeat_interleave(pattern.rows, dim=0), score.shape)


def masked(layer: Layer, pattern: NM) -> Bool[Tensor, "..."]:
    """The mask of the largest weights, which was applied to the layer's weight."""
    mask = nm_mask(layer.weight.abs(), pattern)
    # Not a product with the mask: that would leave −0.0, and NaN where a weight is infinite.
    layer.weight.masked_fill_(~mask, 0.0)
    return mask


def largest(weight: Float[Tensor, "out columns"], density: float) -> Bool[Tensor, "out columns"]:
    """The places of the largest weights, that share of all."""
    size = weight.abs().flatten()
    kept = torch.zeros(len(size), dtype=torch.bool)
    kept[size.argsort(descending=True, stable=True)[: round(density * len(size))]] = True
    return kept.reshape(weight.shape)
