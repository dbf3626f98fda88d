"""Criterion `magnitude`: keeps the largest |W| of every group, as NVIDIA's ASP does; needs no images."""

from jaxtyping import Bool
from torch import Tensor

from mpcompile.passes.nm_mask.criterion import MaskProblem
from mpcompile.passes.nm_mask.selection import nm_mask


def magnitude_mask(problem: MaskProblem) -> Bool[Tensor, "out columns"]:
    """The mask with the largest sum of |W|, W being the layer's own weights."""
    return nm_mask(problem.weight.abs(), problem.pattern)
