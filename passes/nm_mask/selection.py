"""Masks from scores: the N largest scores of every group of M, and the largest weights of a whole layer."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mpcompile.ir.pattern import NM
from mpcompile.ir.weight_groups import grouped, ungrouped


def nm_mask(score: Float[Tensor, "out in_ *taps"], pattern: NM) -> Bool[Tensor, "out in_ *taps"]:
    """The mask with the largest total score: True for the N highest of every M; of equal scores, the first.

    Groups of M are consecutive input channels, for each kernel tap. `pattern.rows` neighbouring output channels share
    one pattern; their scores add up. Since groups do not interact, no other mask of the pattern has a larger total.
    """
    groups = grouped(score, pattern.of)
    shared = groups.reshape(-1, pattern.rows, *groups.shape[1:]).sum(1, dtype=torch.float64)
    # A stable sort, since topk does not specify which of two equal scores it selects.
    best = shared.sort(dim=-1, descending=True, stable=True).indices[..., : pattern.keep]
    kept = torch.zeros_like(shared, dtype=torch.bool).scatter_(-1, best, True)
    return ungrouped(kept.repeat_interleave(pattern.rows, dim=0), score.shape)


def largest(weight: Float[Tensor, "out columns"], density: float) -> Bool[Tensor, "out columns"]:
    """True for the weights of largest |W|; `density` is their share of all weights, in [0, 1]."""
    size = weight.abs().flatten()
    kept = torch.zeros(len(size), dtype=torch.bool)
    kept[size.argsort(descending=True, stable=True)[: round(density * len(size))]] = True
    return kept.reshape(weight.shape)
