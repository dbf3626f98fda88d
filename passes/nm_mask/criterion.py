"""Criterion: a function from a MaskProblem to a mask, with what it needs."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from mpcompile.ir.pattern import NM


@dataclass(frozen=True, slots=True)
class MaskProblem:
    """The inputs of a criterion, for one layer.

    Matrices have one row per output channel and one column per weight of it. Groups of M are consecutive columns (the
    layout of mpcompile.ir.weight_groups.flat).

    Attributes:
        weight: the layer's own weights.
        best: the weights V that fit the targets best with every weight kept; without a refit, the layer's own weights.
        gram: C = E[x xᵀ] of the layer's inputs on the calibration images, one matrix per convolution group (1 for other
            layers). With a refit it is damped, hence positive definite, and about the means if a bias or batch norm can
            absorb a change of the mean output. Without calibration images it has no groups.
        pattern: the pattern that the mask must follow.
        prior: α, the weight of the prior; 0 for none. See criteria/covariance.py.
        prior_density: the share of the layer's largest weights that the prior favours.
    """

    weight: Float[Tensor, "out columns"]
    best: Float[Tensor, "out columns"]
    gram: Float[Tensor, "groups columns columns"]
    pattern: NM
    prior: float = 0.0
    prior_density: float = 0.65

    def input_power(self) -> Float[Tensor, "out columns"]:
        """E[x²] of the input that each weight multiplies."""
        return self.gram.diagonal(dim1=-2, dim2=-1).repeat_interleave(len(self.weight) // len(self.gram), 0)


@dataclass(frozen=True, slots=True)
class Criterion:
    """A criterion with its requirements: a row of CRITERIA.

    Attributes:
        select: returns the mask, True where a weight is kept; it must follow the pattern.
        needs_images: whether it reads `gram`, and so needs calibration images.
        needs_refit: whether it selects weights for their refit; `refit: none` is then refused.
        uses_prior: whether it reads `prior` and `prior_density`; a prior is refused for other criteria.
    """

    select: Callable[[MaskProblem], Bool[Tensor, "out columns"]]
    needs_images: bool = True
    needs_refit: bool = False
    uses_prior: bool = False
