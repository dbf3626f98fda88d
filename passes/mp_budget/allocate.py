"""From scores to densities, and from scores to the patterns that cost least.

Densities: keep the largest scores of all layers together (`densities`). Patterns: each layer takes one of the patterns
that it can carry, or stays dense, so that the summed damage is the least that saves the multiply-accumulates wanted.
With x(ℓ, P) in {0, 1},

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


def densities(scores: Mapping[str, Tensor], density: float) -> dict[str, float]:
    """The share of each layer that is kept when the largest `density` of all scores together is.

    Exact up to scores that are equal to the largest one removed, all of which are removed.
    """
    everything = torch.cat([score.flatten() for score in scores.values()])
    removed = len(everything) - round(density * len(everything))
    if removed <= 0:
        return dict.fromkeys(scores, 1.0)
    threshold = everything.kthvalue(removed).values
    return {name: float((score > threshold).double().mean()) for name, score in scores.items()}


def damage(score: Float[Tensor, "out in_ *taps"], pattern: NM) -> float:
    """The least sum of s² that a mask of this pattern removes."""
    cost = grouped(score, pattern.of).double().square()
    shared = cost.reshape(-1, pattern.rows, *cost.shape[1:]).sum(1)
    removed = shared.topk(pattern.of - pattern.keep, dim=-1, largest=False).values
    return float(removed.sum())


@dataclass(frozen=True, slots=True)
class Option:
    """A pattern that some layers would take together, with the damage and what it saves."""

    layers: tuple[str, ...]  # several where they share one weight
    pattern: NM
    damage: float
    saving: float  # multiply-accumulates an image


class InfeasibleError(ValueError):
    """The saving wanted is more than all options together give; `most` is what they give."""

    def __init__(self, most: float) -> None:
        super().__init__(f"at most {most:g} can be saved")
        self.most = most


def least_damage(options: Sequence[Option], saving: float) -> tuple[Option, ...]:
    """The options of least summed damage that save at least `saving`, at most one for each set of layers.

    Raises InfeasibleError.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    units = list(dict.fromkeys(option.layers for option in options))
    most = sum(max(o.saving for o in options if o.layers == unit) for unit in units)
    if saving > most * (1 + 1e-12):
        raise InfeasibleError(most)
    costs = np.array([option.damage for option in options])
    savings = np.array([option.saving for option in options])
    one_each = np.array([[float(option.layers == unit) for option in options] for unit in units])
    result = milp(
        # Scaled, so that the solver's absolute tolerances are relative ones.
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
