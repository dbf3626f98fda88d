"""N:M on weight tensors: the axis of the groups, and checks of masks.

Groups of M run along the input channels: axis 1 of a Linear's (out, in_) and, tap by tap, of a convolution's
(out, in_, kh, kw). That is the reduction axis that sparse tensor cores need; grouping the flattened
(in_, kh, kw) of a convolution, as some published code does, is another pattern and is not accelerated.
"""

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor, nn

from mpcompile.ir.model import LayerPlan
from mpcompile.ir.pattern import NM


def flat(weight: Shaped[Tensor, "out in_ *taps"]) -> Shaped[Tensor, "out columns"]:
    """The weight as a matrix (out, taps · in_), input channels innermost; `unflat` is the inverse."""
    return weight.movedim(1, -1).reshape(weight.shape[0], -1)


def unflat(matrix: Shaped[Tensor, "out columns"], shape: torch.Size) -> Shaped[Tensor, "out in_ *taps"]:
    """The matrix reshaped to a weight of this shape, contiguous; the inverse of `flat`."""
    return matrix.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()


def grouped(weight: Shaped[Tensor, "out in_ *taps"], of: int) -> Shaped[Tensor, "out groups of"]:
    """The weight with its groups of `of` input channels as the last axis; `ungrouped` is the inverse."""
    return flat(weight).reshape(weight.shape[0], -1, of)


def ungrouped(groups: Shaped[Tensor, "out groups of"], shape: torch.Size) -> Shaped[Tensor, "out in_ *taps"]:
    """The groups reshaped to a weight of this shape, contiguous; the inverse of `grouped`."""
    return unflat(groups.flatten(1), shape)


def pattern_violation(mask: Bool[Tensor, "out in_ *taps"], pattern: NM) -> str | None:
    """How a mask violates a pattern, as a sentence; None if it does not.

    Each group keeps at most `pattern.keep`; each block of `pattern.rows` rows keeps the same positions; with a
    vocabulary, at most so many different patterns occur in each block of M input channels.
    """
    if mask.shape[1] % pattern.of or mask.shape[0] % pattern.rows:
        return f"shape {tuple(mask.shape)} does not divide into {pattern}"
    groups = grouped(mask, pattern.of)
    too_full = int((groups.sum(-1) > pattern.keep).sum())
    if too_full:
        return f"{too_full} of {groups.shape[0] * groups.shape[1]} groups keep more than {pattern}"
    shared = groups.reshape(-1, pattern.rows, *groups.shape[1:])
    unlike = int((shared != shared[:, :1]).any(dim=(1, 2, 3)).sum())
    if unlike:
        return f"{unlike} blocks of {pattern.rows} rows do not share their pattern"
    return _vocabulary_violation(groups, pattern.vocabulary) if pattern.vocabulary else None


def pattern_codes(groups: Bool[Tensor, "*shape of"]) -> Int[Tensor, "*shape"]:
    """A number for each group of M, bit i of which says whether position i is kept."""
    return (groups.long() << torch.arange(groups.shape[-1])).sum(-1)


def _vocabulary_violation(groups: Bool[Tensor, "out groups of"], vocabulary: int) -> str | None:
    """Which blocks of input channels have more than `vocabulary` different patterns, as a sentence; None for none."""
    occurs = torch.zeros(groups.shape[1], 1 << groups.shape[2], dtype=torch.bool)
    counts = occurs.scatter_(1, pattern_codes(groups).T, True).sum(1)
    over = int((counts > vocabulary).sum())
    if not over:
        return None
    return (
        f"{over} of {len(counts)} blocks of {groups.shape[2]} input channels have more than {vocabulary} patterns (up "
        f"to {int(counts.max())})"
    )


def violation(layer: nn.Linear | nn.Conv2d, plan: LayerPlan) -> str | None:
    """How a layer's weight violates the mask in its plan, as a sentence; None if it does not."""
    if plan.mask is None:
        return None
    if plan.mask.shape != layer.weight.shape:
        return f"the mask is {tuple(plan.mask.shape)}, the weight {tuple(layer.weight.shape)}"
    if plan.pattern is not None:
        broken = pattern_violation(plan.mask, plan.pattern)
        if broken:
            return f"the mask itself is not {plan.pattern}: {broken}"
    filled = int((layer.weight.detach()[~plan.mask] != 0).sum())
    return f"{filled} weights that the mask zeroes are not zero" if filled else None
