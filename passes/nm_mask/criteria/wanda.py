"""Criterion `wanda`: keeps the weights with the largest removal cost V² E[x²] (Sun et al., arXiv 2306.11695).

The cost is the increase of the squared output error if that weight alone is removed. Wanda takes V = W, the layer's own
weights. With a refit, V are the weights that fit the targets best with every weight kept.
"""

from jaxtyping import Bool, Float
from torch import Tensor

from mpcompile.passes.nm_mask.criterion import MaskProblem
from mpcompile.passes.nm_mask.selection import nm_mask


def wanda_mask(problem: MaskProblem) -> Bool[Tensor, "out columns"]:
    """The mask with the largest sum of V² E[x²]."""
    return nm_mask(wanda_score(problem), problem.pattern)


def wanda_score(problem: MaskProblem) -> Float[Tensor, "out columns"]:
    """V² E[x²] of each weight."""
    return problem.best.square() * problem.input_power()
