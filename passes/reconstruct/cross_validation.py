"""How strongly the refit of one layer corrects the layer, chosen by cross-validation over parts of the images.

A layer W whose inputs x come from pruned layers is fitted to the dense outputs y, and before a residual add to the
residual error Δ too (passes/reconstruct/residual.py). Both differ from Wx by errors that earlier layers made on these
very images, and a part of that is chance: on few images, or in a wide layer, fitting all of it costs accuracy on other
images. So the refit's targets are

    t = Wx + η_y (y − Wx) + η_Δ Δ,

with two shares η in [0, 1] and the strength λ of the ridge term (passes/reconstruct/least_squares.py). With every
weight kept, the solution is W + η_y D_y + η_Δ D_Δ, where D_y = E[(y − Wx) xᵀ] (C + λI)⁻¹ and
D_Δ = E[Δ xᵀ] (C + λI)⁻¹. For each λ of a few, D_y and D_Δ are fitted on all parts but one, and the shares minimize

    Σ over the parts left out of E‖y + Δ − (W + η_y D_y + η_Δ D_Δ) x‖²,

a quadratic in the shares. The λ of the smallest sum is taken. The mask is not known yet; with it, the shares are the
same to a few hundredths, and the best λ tends to be smaller, which is why none above 0.3 is tried.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from numpy.linalg import LinAlgError
from torch import Tensor

from mpcompile.ir.weight_groups import flat
from mpcompile.passes.reconstruct.layerwise import LayerStep
from mpcompile.passes.reconstruct.least_squares import damped, ridge
from mpcompile.passes.reconstruct.second_moments import LeastSquares, SecondMoments
from mpcompile.system.distributed import shared_map
from mpcompile.system.symmetric_matrices import cholesky_solved, factorize

DAMPINGS = (0.02, 0.08, 0.3)  # λ relative to the mean second moment; the first holds without cross-validation
LEAST_IN_SINGLE = 1e-3  # λ, relative, below which the factors of the cross-validation are float64
MOST_OUTPUTS = 256  # of a layer, spread evenly, by which its strength is chosen
ROUNDS = 100  # of coordinate descent over two shares


@dataclass(frozen=True, slots=True)
class Strength:
    """How strongly a refit corrects a layer.

    Attributes:
        damping: λ, relative to the mean second moment of the inputs.
        dense: η_y, the share of the dense outputs in the targets; the rest are the layer's own outputs.
        residual: η_Δ, the share of the residual error.
    """

    damping: float
    dense: float = 1.0
    residual: float = 0.0


@dataclass(frozen=True, slots=True)
class RefitProblem:
    """What a layer is fitted to.

    Attributes:
        reported: the problem with the target y + η_Δ Δ, whose error is reported.
        solved: the one that the refit solves. It replaces the share 1 − η_y of y by the layer's own outputs, and has
            the ridge term.
        dense_power: E[y²] of each dense output, about its mean if the layer's mean is free.
    """

    reported: LeastSquares
    solved: LeastSquares
    dense_power: Float[Tensor, " out"]


def refit_problem(step: LayerStep, damping: float | None) -> RefitProblem:
    """The problem of a step with moments. `damping` is λ, or None to choose it too."""
    assert step.moments is not None
    weight, centred = flat(step.layer.weight), step.weight.centred
    strength = chosen_strength(step.moments, step.parts, weight, centred, DAMPINGS if damping is None else (damping,))
    problem = _of_targets(step.moments, 1.0, strength.residual).problem(centred)
    dense = _of_targets(step.moments, 1.0, 0.0).problem(centred) if strength.residual else problem
    pulled = replace(problem, cross=problem.cross - (1 - strength.dense) * _correction(dense, weight))
    return RefitProblem(problem, damped(pulled, weight, strength.damping), dense.power)


def chosen_strength(
    moments: SecondMoments,
    parts: Sequence[SecondMoments],
    weight: Float[Tensor, "out columns"],
    centred: bool,
    dampings: Sequence[float],
) -> Strength:
    """The strength of least error on the part left out, out of these λ.

    `moments` are the sum of the parts. They have one target, y, or two, y and Δ. With fewer than two parts that hold
    images there is nothing to choose by: the first λ, all of y, nothing of Δ.
    """
    parts = [part for part in parts if part.count]
    if len(parts) < 2:
        return Strength(dampings[0])
    if len(moments.sum_x) == 1 and len(weight) > MOST_OUTPUTS:
        some = torch.arange(MOST_OUTPUTS) * len(weight) // MOST_OUTPUTS
        weight, moments, parts = weight[some], moments.of_outputs(some), [part.of_outputs(some) for part in parts]

    def left_out(index: int) -> tuple[Tensor, Tensor]:
        others, part = moments.without(parts[index]), parts[index]
        if min(dampings) >= LEAST_IN_SINGLE:
            with suppress(LinAlgError):
                return _terms(others, part, weight, centred, dampings, torch.float32)
        return _terms(others, part, weight, centred, dampings, torch.float64)

    terms = shared_map(left_out, range(len(parts)))
    gain, size = (sum(side[1:], side[0]) for side in zip(*terms, strict=True))
    shares = [_box_minimum(size[row], gain[row]) for row in range(len(dampings))]
    errors = [float(share @ size[row] @ share - 2 * gain[row] @ share) for row, share in enumerate(shares)]
    best = min(range(len(dampings)), key=errors.__getitem__)
    return Strength(dampings[best], *shares[best].tolist())


def _terms(
    others: SecondMoments,
    part: SecondMoments,
    weight: Float[Tensor, "out columns"],
    centred: bool,
    dampings: Sequence[float],
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "dampings targets"], Float[Tensor, "dampings targets targets"]]:
    """The linear and quadratic terms in the shares that a part adds for each λ, fitted on the other parts.

    The inputs are scaled to variances of about 1. Two digits of a share are enough, so factors and products may be
    float32. Raises LinAlgError if the second moments are singular in `dtype`.
    """
    fit = _of_targets(others, 1.0, 0.0).problem(centred)
    crosses = [_correction(fit, weight)]
    if len(others.sum_y) == 2:
        crosses.append(_of_targets(others, 0.0, 1.0).cross(centred))
    check = _of_targets(part, 1.0, 1.0).problem(centred)
    scale = (fit.gram.diagonal(dim1=-2, dim2=-1) + ridge(fit, min(dampings))[:, None]).rsqrt()  # groups, columns
    system, checked = ((gram * scale[:, :, None]).mul_(scale[:, None]).to(dtype) for gram in (fit.gram, check.gram))
    rights = [(fit.by_group(cross) * scale[:, None]).to(dtype) for cross in crosses]
    wanted = (check.by_group(_correction(check, weight)) * scale[:, None]).to(dtype)
    gain = torch.zeros(len(dampings), len(crosses), dtype=torch.float64)
    size = torch.zeros(len(dampings), len(crosses), len(crosses), dtype=torch.float64)
    for row, damping in enumerate(dampings):
        factor = system.clone()
        factor.diagonal(dim1=-2, dim2=-1).add_(ridge(fit, damping)[:, None] * scale.square())
        if not factorize(factor):
            raise LinAlgError(f"the second moments are singular with a damping of {damping}")
        steps = [cholesky_solved(factor, right.mT).mT for right in rights]
        for i, step in enumerate(steps):
            gain[row, i] = (wanted * step).sum(dtype=torch.float64)
            in_gram = step @ checked
            for j, other in enumerate(steps):
                size[row, i, j] = (in_gram * other).sum(dtype=torch.float64)
    return gain, size


def _of_targets(moments: SecondMoments, dense: float, residual: float) -> SecondMoments:
    """The moments with the single target dense · y + residual · Δ; without Δ, dense · y."""
    return moments.combined(torch.tensor([[dense], [residual]])[: len(moments.sum_y)])


def _correction(problem: LeastSquares, weight: Float[Tensor, "out columns"]) -> Float[Tensor, "out columns"]:
    """E[(y − Wx) xᵀ]."""
    return problem.cross - (problem.by_group(weight) @ problem.gram).reshape(weight.shape)


def _box_minimum(size: Float[Tensor, "n n"], gain: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The minimum of sᵀ A s − 2 gᵀ s over s in [0, 1]ⁿ, for A = `size` ≥ 0 and g = `gain`, by coordinate descent.

    A share that changes nothing (A_ii = 0) stays where the search starts: 1 for the first, 0 for the second.
    """
    share = torch.zeros_like(gain)
    share[0] = 1.0
    for _ in range(ROUNDS):
        for i in range(len(share)):
            if size[i, i] > 0:
                share[i] = ((gain[i] - size[i] @ share) / size[i, i] + share[i]).clamp(0, 1)
    return share
