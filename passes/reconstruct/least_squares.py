"""Least-squares reconstruction: the optimal weights on a given support, from the second moments of a layer's inputs.

For target outputs y and inputs x with C = E[x xᵀ] and G = E[y xᵀ], the weights W′ that are zero outside the support S
minimize

    E‖y − W′x‖² + λ‖W′ − W‖²,    λ = damping · mean(diag C),

where W is the layer's own weight. Each row is solved on its own: W′_S = (G + λW)_S ((C + λI)_SS)⁻¹, by Cholesky in
float64. The ridge term pulls towards W, not towards zero. So if nothing is removed, λ has no effect: with y = Wx and a
full support, W′ = W for every λ. An input that never varies keeps its weight. As in Optimal Brain Surgeon (Hassibi and
Stork 1993) and SparseGPT (arXiv 2301.00774), but exact: SparseGPT updates only the columns to the right of the one that
it removes.

On every support, the objective at W′ is at most that at W restricted to the support; with λ = 0, so is the error alone.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from numpy.linalg import LinAlgError
from torch import Tensor

from mpcompile.passes.reconstruct.second_moments import LeastSquares
from mpcompile.system.distributed import all_gathered, largest_of_all, share, together
from mpcompile.system.symmetric_matrices import cholesky, cholesky_solved, factorize

CHUNK_BYTES = 512 << 20  # of submatrices of C that are solved at once
REFINEMENTS = 8  # at most, before the system is solved in float64
# Relative size of the last correction. A small residual is no proof: the error is the residual times the condition.
CONVERGED = 1e-8
# MKL's results depend on where rows and matrices begin in memory, and on the number of rows of a product. With sizes
# that are multiples of this, all begin at multiples of 64 bytes, and a row has the same bits in any batch.
SIZE_STEP = 16
WORTH_SHARING = 1e8  # multiply-accumulates of the factors, above which ranks share them


def of_layer(problem: LeastSquares, weight: Float[Tensor, "out columns"], bias: Tensor | None) -> LeastSquares:
    """The problem on the same inputs whose targets are the outputs of the layer's own weights, y = Wx + b."""
    w, mean = problem.by_group(weight), problem.mean_of(weight)
    cross = w @ problem.gram
    return replace(
        problem,
        cross=cross.reshape(weight.shape),
        power=(cross * w).sum(-1).flatten(),
        mean_y=mean if bias is None else mean + bias.double(),
    )


def damped(problem: LeastSquares, weight: Float[Tensor, "out columns"], damping: float) -> LeastSquares:
    """Adds ridge regularization towards `weight`: λ = damping · mean(diag C), or λ = 1 if C is zero."""
    strength = ridge(problem, damping)
    per_row = strength.repeat_interleave(len(weight) // len(strength))[:, None]
    double, gram = weight.double(), problem.gram.clone()
    gram.diagonal(dim1=-2, dim2=-1).add_(strength[:, None])
    return replace(
        problem,
        gram=gram,
        cross=problem.cross + per_row * double,
        power=problem.power + (per_row * double.square()).sum(-1),
    )


def ridge(problem: LeastSquares, damping: float) -> Float[Tensor, " groups"]:
    """λ = damping · mean(diag C) of each group, or 1 if C is zero."""
    scale = problem.gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    return torch.where(scale > 0, damping * scale, 1.0)


def unconstrained(problem: LeastSquares) -> Float[Tensor, "out columns"]:
    """The optimal weights V = G C⁻¹ with a full support. Raises LinAlgError if C is singular."""
    by_group = problem.cross.reshape(len(problem.gram), -1, problem.gram.shape[-1])
    return cholesky_solved(cholesky(problem.gram), by_group.mT).mT.reshape(problem.cross.shape)


def refit(problem: LeastSquares, mask: Bool[Tensor, "out columns"]) -> Float[Tensor, "out columns"]:
    """The optimal weights on the support `mask`, in float64; zero outside it.

    Rows with the same support are solved together. Raises LinAlgError if C is singular on a support.
    """
    groups, per_group = len(problem.gram), len(mask) // len(problem.gram)
    result = torch.zeros_like(problem.cross)
    for group in range(groups):
        rows = slice(group * per_group, (group + 1) * per_group)
        _refit_group(problem.gram[group], problem.cross[rows], mask[rows], result[rows])
    return result


def _refit_group(gram: Tensor, cross: Tensor, mask: Tensor, result: Tensor) -> None:
    """Writes the solution for the rows of one convolution group, which have the same inputs, into `result`."""
    supports, support_of_row = torch.unique(mask, dim=0, return_inverse=True)
    largest = int(supports.sum(1).max())
    if largest == 0:
        return
    # Scaled to a unit diagonal, so that inputs with a small variance keep their float32 precision.
    scale = gram.diagonal().clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
    system = _System(gram * scale[:, None] * scale, scale)
    # A support smaller than the largest is padded with columns that `_submatrices` decouples; their solution is 0.
    columns = _padded(supports.to(torch.uint8).argsort(dim=1, descending=True, stable=True), largest)
    # The rows of each support. A support with fewer rows than the most common one repeats its own.
    counts = support_of_row.bincount(minlength=len(supports))
    repeated = torch.arange(int(counts.max())) % counts[:, None]
    rows = support_of_row.argsort(stable=True)[(counts.cumsum(0) - counts)[:, None] + repeated]
    step = max(1, CHUNK_BYTES // (largest * largest * 8))
    with together(share().size > 1 and len(supports) * largest**3 > WORTH_SHARING):
        here = share()
        for begin in range(0, len(supports), step):
            chunk = torch.arange(begin, min(begin + step, len(supports)))
            own = chunk[here.rank :: here.size]
            right = cross[rows[own]] * supports[own, None]
            solutions = all_gathered(system.solve(right, columns[own], supports[own]))
            for rank, solution in enumerate(solutions):
                result[rows[chunk[rank :: here.size]]] = solution.to(result.device)


def _padded(order: Int[Tensor, "n k"], largest: int) -> Int[Tensor, "n kept"]:
    """The first columns of each row of `order`, at least `largest`, in a number that is a multiple of SIZE_STEP.

    What is beyond the columns that exist is the last one again, which is in no support; without such a one the number
    stays `largest`.
    """
    existing = order.shape[1]
    wanted = existing if largest == existing else largest + -largest % SIZE_STEP
    return torch.cat([order[:, :wanted], order[:, -1:].expand(-1, max(0, wanted - existing))], dim=1)


def _aligned(matrix: Float[Tensor, "n k"]) -> Tensor:
    """The matrix with zeros up to multiples of SIZE_STEP in both dimensions."""
    rows, columns = matrix.shape
    return F.pad(matrix, (0, -columns % SIZE_STEP, 0, -rows % SIZE_STEP))


class _System:
    """Solves a scaled C on supports, to a relative error of about 1e-8: below the float32 rounding of stored weights.

    If the condition allows it, factors are float32 and residuals float64 (iterative refinement, Moler 1967), which
    halves the time. Else everything is float64. In a process group each rank solves for its own supports, and all ranks
    refine as often as one process would for all of them.
    """

    def __init__(self, matrix: Float[Tensor, "k k"], scale: Float[Tensor, " k"]) -> None:
        self._matrix, self._single, self._scale = matrix, matrix.float(), scale
        self._aligned = _aligned(matrix)
        self._memory: dict[torch.dtype, Tensor] = {}  # for the submatrices of one chunk after another

    def solve(
        self, right: Float[Tensor, "n rows k"], columns: Int[Tensor, "n kept"], support: Bool[Tensor, "n k"]
    ) -> Float[Tensor, "n rows k"]:
        """The solutions, zero outside the supports; the right-hand sides must be zero there too."""
        index = columns[:, None].expand(-1, right.shape[1], -1)
        right = right * self._scale
        on = support[:, None].double()

        def scattered(solved: Tensor) -> Tensor:
            """The entries of the submatrix at their columns, in float64."""
            return torch.zeros_like(right).scatter_(2, index, solved.mT.double()) * on

        factors = self._submatrices(self._single, columns, support)
        if not largest_of_all(float(not factorize(factors))):
            x, residual = torch.zeros_like(right), right
            for _ in range(REFINEMENTS):
                correction = scattered(cholesky_solved(factors, residual.gather(2, index).float().mT))
                x = x + correction
                size = x.norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
                if largest_of_all(float((correction.norm(dim=-1) / size).amax()) if len(x) else 0.0) < CONVERGED:
                    return x * self._scale
                products = (_aligned(x.flatten(0, 1)) @ self._aligned)[: x.shape[0] * x.shape[1], : x.shape[2]]
                residual = (right - products.reshape(x.shape)) * on
        exact = self._submatrices(self._matrix, columns, support)
        if not factorize(exact):
            raise LinAlgError("the second moments are singular on a support")
        return scattered(cholesky_solved(exact, right.gather(2, index).mT)) * self._scale

    def _submatrices(self, matrix: Tensor, columns: Tensor, support: Tensor) -> Float[Tensor, "n kept kept"]:
        """The matrix on each support. Padding columns have 1 on the diagonal and 0 elsewhere."""
        blocks = self._blocks(matrix.dtype, *columns.shape)
        rows = matrix.new_empty(columns.shape[1], len(matrix))
        for block, chosen in zip(blocks, columns, strict=True):  # faster than one indexing of all
            torch.index_select(matrix, 0, chosen, out=rows)
            torch.index_select(rows, 1, chosen, out=block)
        kept = support.gather(1, columns).to(matrix.dtype)
        if not bool(kept.all()):
            blocks.mul_(kept[:, :, None]).mul_(kept[:, None])
            blocks.diagonal(dim1=1, dim2=2).add_(1 - kept)
        return blocks

    def _blocks(self, dtype: torch.dtype, count: int, size: int) -> Float[Tensor, "n kept kept"]:
        """Uninitialized memory for so many submatrices, the same at each call if it suffices."""
        known = self._memory.get(dtype)
        if known is None or known.shape[1] != size or len(known) < count:
            known = self._memory[dtype] = self._matrix.new_empty(count, size, size, dtype=dtype)
        return known[:count]
