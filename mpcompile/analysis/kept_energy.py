"""Kept energy: the share of a dense weight's squares that a mask keeps, along the groups of input channels."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mpcompile.ir.weight_groups import grouped

BINS = 24  # at most: of neighbouring groups


def kept_energy(
    dense: Float[Tensor, "out in_ *taps"], mask: Bool[Tensor, "out in_ *taps"], of: int
) -> tuple[float, ...]:
    """Σ w² over kept weights / Σ w², for up to BINS runs of groups of `of` input channels, in order of the channels.

    The taps of a convolution are summed. A run of weights that are all zero keeps everything. All are about as large
    if no channel matters more than others; a low one belongs to channels whose groups hold several large weights.
    """
    taps = dense[0, 0].numel()
    squares = dense.detach().double().square()
    by_group = [grouped(part, of).sum((0, 2)).reshape(taps, -1).sum(0) for part in (squares * mask, squares)]
    both = torch.stack(by_group)
    sums = torch.stack([part.sum(1) for part in both.tensor_split(min(BINS, both.shape[1]), dim=1)], dim=1)
    return tuple(torch.where(sums[1] > 0, sums[0] / sums[1].clamp_min(1e-300), 1.0).tolist())
