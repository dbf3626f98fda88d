"""The weights that are best on a given support: exact least squares from a layer's second moments.

For wanted outputs y and inputs x with C = E[x xᵀ] and G = E[y xᵀ], weights W′ that are zero outside the kept places S
and stay near the layer's own W minimise

    E‖y − W′x‖² + λ‖W′ − W‖²,    λ = damping · mean(diag C),

one row at a time: W′_S = (G + λW)_S ((C + λI)_SS)⁻¹, by Cholesky in float64. Pulling towards W rather than towards
zero makes λ harmless where nothing is removed: with y = Wx and all places kept, W′ = W for every λ. An input that never
varies has its weight as it was. As in Optimal Brain Surgeon (Hassibi and Stork 1993) and SparseGPT (arXiv 2301.00774),
but exact: SparseGPT updates only the columns to the right of the one it removes.

On every support the refit loses no more than W′ = W does, in the sum above; in its first term alone, too, where λ is 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mpcompile.passes.reconstruct.layerwise import Layer, TiedWeight
from mpcompile.passes.reconstruct.second_moments import LeastSquares, SecondMoments

CHUNK_BYTES = 512 << 20  # of gathered matrices at once
REFINEMENTS = 8
# The last correction in units of the solution. A small residual would not do: times the condition, it is the error.
CONVERGED = 1e-8


def of_layer(problem: LeastSquares, weight: Float[Tensor, "out columns"], bias: Tensor | None) -> LeastSquares:
    """The problem whose wanted outputs are the layer's own, y = Wx + b, on the same inputs."""
    w, mean = problem.by_group(weight), problem.mean_of(weight)
    cross = w @ problem.gram
    return replace(
        problem,
        cross=cross.reshape(weight.shape),
        power=(cross * w).sum(-1).flatten(),
        mean_y=mean if bias is None else mean + bias.double(),
    )


def damped(problem: LeastSquares, weight: Float[Tensor, "out columns"], damping: float) -> LeastSquares:
    """The problem with the pull towards `weight`; where no input varies at all, that pull alone."""
    scale = problem.gram.diagonal(dim1=-2, dim2=-1).mean(-1)  # groups
    strength = torch.where(scale > 0, damping * scale, 1.0)
    per_row = strength.repeat_interleave(len(weight) // len(strength))[:, None]
    eye = torch.eye(problem.gram.shape[-1], dtype=torch.float64)
    double = weight.double()
    return replace(
        problem,
        gram=problem.gram + strength[:, None, None] * eye,
        cross=problem.cross + per_row * double,
        power=problem.power + (per_row * double.square()).sum(-1),
    )


def unconstrained(problem: LeastSquares) -> Float[Tensor, "out columns"]:
    """The best weights with every place kept, V. Raises torch.linalg.LinAlgError where C is singular."""
    return _solved(torch.linalg.cholesky(problem.gram), problem.cross)


def _solved(factor: Float[Tensor, "groups columns columns"], cross: Float[Tensor, "out columns"]) -> Tensor:
    """G C⁻¹, of C's Cholesky factor."""
    by_group = cross.reshape(len(factor), -1, factor.shape[-1])
    return torch.cholesky_solve(by_group.mT, factor).mT.reshape(cross.shape)


def refit(problem: LeastSquares, mask: Bool[Tensor, "out columns"]) -> Float[Tensor, "out columns"]:
    """The best weights with only the masked-in places kept; float64.

    Neighbouring rows with one support are solved together. Raises torch.linalg.LinAlgError where C is singular there.
    """
    groups, per_group = len(problem.gram), len(mask) // len(problem.gram)
    result = torch.zeros_like(problem.cross)
    for group in range(groups):
        rows = slice(group * per_group, (group + 1) * per_group)
        _refit_group(problem.gram[group], problem.cross[rows], mask[rows], result[rows])
    return result


def _refit_group(gram: Tensor, cross: Tensor, mask: Tensor, result: Tensor) -> None:
    """Writes the solution for rows that share their inputs."""
    supports, which = torch.unique(mask, dim=0, return_inverse=True)
    most = int(supports.sum(1).max())
    if most == 0:
        return
    # To a unit diagonal, so that float32 loses no small input.
    scale = gram.diagonal().clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
    system = _System(gram * scale[:, None] * scale, scale)
    # Supports of unequal size are filled up with places that are made independent of the rest and wanted to be 0.
    places = supports.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    # The rows of each support, and where it has fewer than another, some of them again.
    counts = which.bincount(minlength=len(supports))
    turns = torch.arange(int(counts.max())) % counts[:, None]
    rows = which.argsort(stable=True)[(counts.cumsum(0) - counts)[:, None] + turns]
    step = max(1, CHUNK_BYTES // (most * most * 8))
    for begin in range(0, len(supports), step):
        chunk = slice(begin, begin + step)
        wanted = cross[rows[chunk]] * supports[chunk, None]
        result[rows[chunk]] = system.solve(wanted, places[chunk], supports[chunk])


class _System:
    """A scaled C, solved on supports to about 1e-8, finer than the float32 that weights are stored in.

    Factors in float32 with residuals in float64 where the condition allows it (iterative refinement, Moler 1967), which
    is half the time; else all in float64.
    """

    def __init__(self, matrix: Float[Tensor, "k k"], scale: Float[Tensor, " k"]) -> None:
        self._matrix, self._single, self._scale = matrix, matrix.float(), scale

    def solve(
        self, wanted: Float[Tensor, "n rows k"], places: Int[Tensor, "n kept"], support: Bool[Tensor, "n k"]
    ) -> Float[Tensor, "n rows k"]:
        """The solutions, zero outside the supports; `wanted` is zero there too."""
        right = wanted * self._scale
        index = places[:, None].expand(-1, wanted.shape[1], -1)
        on = support[:, None].double()

        def spread(solved: Tensor) -> Tensor:
            return torch.zeros_like(right).scatter_(2, index, solved.mT.double()) * on

        factors, failed = torch.linalg.cholesky_ex(self._blocks(self._single, places, support))
        if not bool(failed.any()):
            x, residual = torch.zeros_like(right), right
            for _ in range(REFINEMENTS):
                correction = spread(torch.cholesky_solve(residual.gather(2, index).float().mT, factors))
                x = x + correction
                size = x.norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
                if float((correction.norm(dim=-1) / size).max()) < CONVERGED:
                    return x * self._scale
                residual = (right - (x.flatten(0, 1) @ self._matrix).reshape(x.shape)) * on
        exact = torch.linalg.cholesky(self._blocks(self._matrix, places, support))
        return spread(torch.cholesky_solve(right.gather(2, index).mT, exact)) * self._scale

    def _blocks(self, matrix: Tensor, places: Tensor, support: Tensor) -> Float[Tensor, "n kept kept"]:
        """The matrix on each support; a place that only fills up is alone."""
        blocks = matrix[places[:, :, None], places[:, None, :]]
        real = support.gather(1, places).to(matrix.dtype)
        if bool(real.all()):
            return blocks
        return blocks * real[:, :, None] * real[:, None] + torch.diag_embed(1 - real)


def proven_share(
    parts: Sequence[SecondMoments], weight: Float[Tensor, "out columns"], centred: bool, damping: float
) -> Float[Tensor, " out"]:
    """For each output the share η in [0, 1] of a second wanted output Δ that is worth fitting beside the first, y.

    What few images show of Δ may be chance, and is then fitted at the cost of y. So weights V for y and D for Δ are
    found without one part of the images, and η makes E(y + Δ − (V + ηD)x)² on that part least, summed over all parts.
    """
    gain = size = torch.zeros(len(weight), dtype=torch.float64)
    parts = [part for part in parts if part.count]
    if len(parts) < 2:
        return gain
    y, delta = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])
    for index, left_out in enumerate(parts):
        fitted = sum(parts[:index] + parts[index + 1 :], SecondMoments())
        own = damped(fitted.combined(y).problem(centred), weight, damping)
        factor = torch.linalg.cholesky(own.gram)
        v, d = _solved(factor, own.cross), _solved(factor, fitted.combined(delta).problem(centred).cross)
        check = left_out.combined(y + delta).problem(centred)
        moved = (check.by_group(d) @ check.gram).reshape(d.shape)  # D C
        gain = gain + (check.cross * d).sum(-1) - (moved * v).sum(-1)
        size = size + (moved * d).sum(-1)
    return torch.where(size > 0, gain / size.clamp_min(torch.finfo(torch.float64).tiny), 0.0).clamp(0, 1)


def put(site: TiedWeight, layer: Layer, fitted: Mapping[str, Tensor]) -> None:
    """Writes `weight`, and `bias` where there is one: to the layer, or to the batch normalisation that reads it."""
    layer.weight.copy_(fitted["weight"])
    if "bias" not in fitted:
        return
    if site.biased and layer.bias is not None:
        layer.bias.copy_(fitted["bias"])
    elif site.norm is not None and site.norm.running_mean is not None:
        # Adding to what is normalised is subtracting from the mean that it is normalised by.
        site.norm.running_mean -= fitted["bias"].to(site.norm.running_mean.dtype)
