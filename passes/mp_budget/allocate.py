"""Allocates a budget over layers: densities from scores, or the patterns of least damage.

`densities` keeps the largest scores of all layers together. `least_damage` chooses one pattern for each layer, or none,
so that the summed damage is minimal and the wanted MACs are saved. With x(ℓ, P) in {0, 1},

    minimise Σ D(ℓ, P) x(ℓ, P)   subject to   Σ_P x(ℓ, P) ≤ 1,   Σ (1 − N/M) MACs(ℓ) x(ℓ, P) ≥ saving,

where D(ℓ, P) is the least sum of s² that a mask of pattern P removes from layer ℓ. This is solved to optimality as an
integer program (HiGHS, through scipy).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mpcompile.ir.pattern import NM
from mpcompile.ir.weight_groups import grouped
from mpcompile.passes.nm_mask.selection import nm_mask

ROUNDING = 1e-12  # above the relative error of a sum of MACs


def densities(scores: Mapping[str, Tensor], density: float) -> dict[str, float]:
    """The density of each layer if the largest scores of all layers are kept, a share `density` of them all.

    Scores equal to the largest removed score are all removed, so ties may lower the total density.
    """
    everything = torch.cat([score.flatten() for score in scores.values()])
    removed = len(everything) - round(density * len(everything))
    if removed <= 0:
        return dict.fromkeys(scores, 1.0)
    threshold = everything.kthvalue(removed).values
    return {name: float((score > threshold).double().mean()) for name, score in scores.items()}


def damage(score: Float[Tensor, "out in_ *taps"], pattern: NM) -> float:
    """The least sum of s² that a mask of this pattern can remove; nearly the least if it has a vocabulary."""
    if pattern.vocabulary:
        squares = score.double().square()
        return float(squares[~nm_mask(squares, pattern)].sum())
    cost = grouped(score, pattern.of).double().square()
    shared = cost.reshape(-1, pattern.rows, *cost.shape[1:]).sum(1)
    removed = shared.topk(pattern.of - pattern.keep, dim=-1, largest=False).values
    return float(removed.sum())


@dataclass(frozen=True, slots=True)
class Option:
    """A pattern for one layer, or for several that share a weight, with its damage and the MACs that it saves."""

    layers: tuple[str, ...]  # several if they share one weight
    pattern: NM
    damage: float
    saving: float  # multiply-accumulates an image


class InfeasibleError(ValueError):
    """The wanted saving exceeds `most`, the saving of all options together."""

    def __init__(self, most: float) -> None:
        super().__init__(f"at most {most:g} can be saved")
        self.most = most


def least_damage(options: Sequence[Option], saving: float) -> tuple[Option, ...]:
    """The options of least summed damage that save at least `saving` MACs, at most one for each set of layers.

    Raises InfeasibleError if no choice saves as much.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    layer_sets = list(dict.fromkeys(option.layers for option in options))
    most = sum(max(o.saving for o in options if o.layers == layers) for layers in layer_sets)
    if saving > most * (1 + 10 * ROUNDING):
        raise InfeasibleError(most)
    costs = np.array([option.damage for option in options])
    savings = np.array([option.saving for option in options])
    one_each = np.array([[float(option.layers == layers) for option in options] for layers in layer_sets])
    result = milp(
        # Scaled, so that the solver's absolute tolerances act as relative ones.
        costs / max(costs.max(), np.finfo(float).tiny),
        constraints=[
            LinearConstraint(one_each, ub=1.0),
            LinearConstraint(savings[None, :] / most, lb=min(saving / most, 1.0)),
        ],
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if not result.success:
        raise RuntimeError(f"the integer program was not solved: {result.message}")
    return tuple(option for option, taken in zip(options, result.x, strict=True) if taken > 0.5)
