"""Criterion `joint`: selects the mask and the kept weights jointly, by ADMM (alternating projections with multipliers).

A refit compensates a removed weight by the other weights of its row. So the best support is not that of the weights
that matter most one by one. For the best dense weights V of a layer and C = E[x xᵀ], the problem is

    min over W of tr (V − W) C (V − W)ᵀ    subject to W following the pattern.

ADMM (Boyd et al. 2011; for pruning ALPS, arXiv 2406.07831) splits W from a copy Z that follows the pattern. Inputs are
scaled to unit mean square, so that the projection keeps the largest |w|·rms(x), as Wanda does:

    W ← (V C + ρ(Z − U)) (C + ρI)⁻¹,    Z ← the N largest of every M of W + U,    U ← U + W − Z.

For a pattern with a vocabulary, that is chosen for V, and Z takes for each row the pattern that keeps most of W + U.

ρ grows by a fifth per round, until the support has not changed for STABLE_ROUNDS rounds. C is diagonalized once, so
a round costs two products with as many rows as the layer has outputs; if these are more than its inputs, the inverse of
C + ρI and one such product cost less. They are float32, which is enough to select the support; the weights themselves
come from the exact refit on it. In a process group each rank selects for a run of the rows: a row of a product has the
same bits whichever rows are computed with it.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mpcompile.ir.pattern import NM
from mpcompile.passes.nm_mask.criterion import MaskProblem
from mpcompile.passes.nm_mask.selection import projection
from mpcompile.system.distributed import all_gathered, largest_of_all, share
from mpcompile.system.symmetric_matrices import eigenvectors

RHO = 0.01
RHO_GROWTH = 1.2  # slower growth finds supports with a 2 % lower error after the refit, in twice the time
ROUNDS = 36
STABLE_ROUNDS = 6
FEWEST_ROWS = 32  # blocks of rows for each rank, below which no rank has a share of its own
WHOLE = slice(None)


def joint_mask(problem: MaskProblem) -> Bool[Tensor, "out columns"]:
    """The support that ADMM selects; `problem.gram` must be positive definite."""
    return joint_support(problem.best, problem.gram, problem.pattern)


def joint_support(
    best: Float[Tensor, "out columns"], gram: Float[Tensor, "groups columns columns"], pattern: NM
) -> Bool[Tensor, "out columns"]:
    """The support that ADMM selects for V = `best` and C = `gram`, which must be positive definite."""
    scale = gram.diagonal(dim1=-2, dim2=-1).sqrt()  # groups, columns
    values, vectors = eigenvectors((gram / (scale[:, :, None] * scale[:, None])).float())
    rows, rows_each = _own_rows(len(best), len(gram), pattern), len(best) // len(gram)
    v = (best.reshape(len(gram), -1, best.shape[1])[:, rows] * scale[:, None]).float()
    target = ((v @ vectors) * values[:, None]) @ vectors.mT  # V C
    z, u, rho, stable_rounds = v, torch.zeros_like(v), RHO, 0
    project = projection(pattern)
    kept = project(v.flatten(0, 1).square())
    for _ in range(ROUNDS):
        w = target + rho * (z - u)
        if rows_each > len(vectors[0]):  # one product of the columns and one of the rows, not two of the rows
            w = w @ ((vectors / (values[:, None] + rho)) @ vectors.mT)
        else:
            w = ((w @ vectors) / (values[:, None] + rho)) @ vectors.mT
        w += u
        now = project(w.flatten(0, 1).square())
        z = torch.where(now.reshape(v.shape), w, 0)
        u = w - z
        changed = not torch.equal(now, kept)
        if rows != WHOLE:
            changed = bool(largest_of_all(float(changed)))
        stable_rounds = 0 if changed else stable_rounds + 1
        kept = now
        if stable_rounds == STABLE_ROUNDS:
            break
        rho *= RHO_GROWTH
    return kept if rows == WHOLE else torch.cat([part.to(kept.device) for part in all_gathered(kept)])


def _own_rows(count: int, groups: int, pattern: NM) -> slice:
    """The rows that this rank selects for: an equal run of them, or all where they are few or depend on each other."""
    here = share()
    blocks = count // pattern.rows
    if here.size == 1 or groups > 1 or pattern.vocabulary or blocks < FEWEST_ROWS * here.size:
        return WHOLE
    first, end = (pattern.rows * (blocks * rank // here.size) for rank in (here.rank, here.rank + 1))
    return slice(first, end)
