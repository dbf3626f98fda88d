"""Search for the int8 weights of least error, at given scales, for all rows of a layer at once.

For a row with scale s, target products G and second moments C of its inputs, the error of the integers q is

    E(y − s q·x)² = E[y²] − 2 s G·q + s² qᵀ C q.

Two searches visit the columns in turn, in descending order of E[x²]:

- Sequential rounding compensates the rounding error of each column in the columns that are still to come. With
  C = R Rᵀ, R upper triangular, column k is rounded at w_k − Σ_(j<k) (q_j − w_j) R_jk / R_kk. This is Babai's nearest
  plane, and gives the integers of GPTQ (arXiv 2210.17323) without the inverse of C. All rows share the factor of all
  columns, as in SparseGPT (arXiv 2301.00774): a masked column is rounded to zero, and what was compensated in it is
  passed on to the columns after it.
- Coordinate descent sets each kept column to its optimal integer, given the others. No step raises the error. It finds
  what sequential rounding lost in masked columns.

A column of all rows is updated in one step, and the columns after it in blocks. Lane rules limit each step, so they
hold at any time (passes/quantize/lane_rule.py).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from mpcompile.passes.quantize.lane_rule import LIMIT, TOP, float32_above
from mpcompile.passes.reconstruct.second_moments import LeastSquares

BLOCK = 64  # columns whose updates of the columns after them are applied at once
SWEEPS = 2  # of coordinate descent; a third lowers the error by at most 2 % on the example ViT
DAMPING = 0.01  # of the factor R, relative to the mean of diag C, as in GPTQ; the error itself is not damped
FROZEN = 1e-9  # columns whose E[x²] is below this share of the mean hardly move: their residual is rounding noise


@dataclass(frozen=True, slots=True)
class Result:
    """Scales and integers of all rows, and their errors. Integers are in the layout of `Search`."""

    scale: Float[Tensor, " out"]
    integers: Float[Tensor, "groups columns rows"]
    error: Float[Tensor, " out"]


def better_rows(one: Result, other: Result) -> Result:
    """Of each row, the result with the smaller error; `one` if they are equal or the other is not finite."""
    better = other.error < one.error
    return Result(
        torch.where(better, other.scale, one.scale),
        torch.where(better.reshape(len(one.integers), 1, -1), other.integers, one.integers),
        torch.where(better, other.error, one.error),
    )


@dataclass(frozen=True, slots=True)
class Search:
    """A least-squares problem with its columns in the order of the search.

    Matrices are (groups, columns, rows), so that one column of all rows is contiguous. The search itself is float32,
    since only integers come out of it. Errors, by which results are compared, are float64.

    Attributes:
        power: E[y²] of each output.
        order: the columns of each group, by descending E[x²].
        gram: C.
        cross: G.
        compensation: R_jk / R_kk for j < k, else 0.
        coupling: C_jk / C_kk for j ≠ k, else 0.
        size: C_kk, with a floor.
        keep: 1 for kept weights, else 0.
        lanes: the lane of each weight, if a rule is given.
    """

    power: Float[Tensor, " out"]
    order: Int[Tensor, "groups columns"]
    gram: Float[Tensor, "groups columns columns"]
    cross: Float[Tensor, "groups columns rows"]
    compensation: Float[Tensor, "groups columns columns"]
    coupling: Float[Tensor, "groups columns columns"]
    size: Float[Tensor, "groups columns 1"]
    keep: Float[Tensor, "groups columns rows"]
    lanes: Int[Tensor, "groups columns rows"] | None

    def by_column(self, matrix: Shaped[Tensor, "out columns"]) -> Shaped[Tensor, "groups columns rows"]:
        """The matrix in the layout of the search."""
        return _by_column(self.order, matrix)

    def by_row(self, columns: Shaped[Tensor, "groups columns rows"]) -> Shaped[Tensor, "out columns"]:
        """The inverse of `by_column`."""
        order = self.order[..., None].expand(columns.shape)
        return torch.empty_like(columns).scatter_(1, order, columns).mT.flatten(0, 1)

    def result(self, scale: Float[Tensor, " out"], integers: Float[Tensor, "groups columns rows"]) -> Result:
        """The integers at this scale, with their error."""
        return self._results(scale, integers, scale)[0]

    def run(
        self,
        weight: Float[Tensor, "out columns"],
        scale: Float[Tensor, " out"],
        integers: Float[Tensor, "out columns"],
        least: Float[Tensor, " out"],
    ) -> Result:
        """The result of sequential rounding and coordinate descent, with the scale refitted where that is better.

        Args:
            weight: to be rounded by the sequential search.
            scale: of the integers.
            integers: in range, zero where masked, and within the lanes. They tell the sequential search how much of
                each lane the columns to come need.
            least: the smallest scale that a refit may choose.
        """
        per_row = scale.reshape(len(self.order), 1, -1)
        exact = (self.by_column(weight) / per_row).float()
        found = self.by_column(integers).float()
        sums = None if self.lanes is None else _sums(self.lanes, found)
        self._visit(self.compensation, exact.clone(), exact, found, sums, later_only=True)
        residual = self.cross / per_row - self.gram @ found.double()
        target = (found + residual / self.size).float()
        for sweep in range(SWEEPS):
            self._visit(self.coupling, target, found.clone(), found, sums, later_only=sweep == SWEEPS - 1)
        return better_rows(*self._results(scale, found.double(), least))

    def _results(self, scale: Tensor, integers: Tensor, least: Tensor) -> tuple[Result, Result]:
        """The integers at this scale, and at the scale G·q / qᵀCq of least error, or `least` if that is larger."""
        linear = (self.cross * integers).sum(1).flatten()
        square = ((self.gram @ integers) * integers).sum(1).flatten()
        best = linear / torch.where(square > 0, square, 1.0)
        scales = (scale, float32_above(torch.maximum(best, least)))
        one, other = (Result(s, integers, self.power - 2 * s * linear + s.square() * square) for s in scales)
        return one, other

    def _visit(
        self,
        matrix: Float[Tensor, "groups columns columns"],
        target: Float[Tensor, "groups columns rows"],
        reference: Float[Tensor, "groups columns rows"],
        integers: Float[Tensor, "groups columns rows"],
        sums: tuple[Tensor, Tensor] | None,
        *,
        later_only: bool,
    ) -> None:
        """Sets each column of `integers` in turn to its rounded target, and updates the targets of the other columns.

        When column j is set, the target of column k moves by −matrix_jk · (integer − reference)_j. Writes `integers`,
        `target` and `sums`, the sums of the lanes. With `later_only`, the targets of earlier columns are not updated.
        """
        width = target.shape[1]
        for begin in range(0, width, BLOCK):
            block = slice(begin, min(begin + BLOCK, width))
            local, within = target[:, block].clone(), matrix[:, block, block]
            for i in range(local.shape[1]):
                column = begin + i
                new = self._admitted(column, local[:, i], integers[:, column], sums)
                integers[:, column] = new
                change = (new - reference[:, column])[:, None]
                local[:, i + 1 :].baddbmm_(within[:, i, i + 1 :, None], change, alpha=-1)
            others = slice(block.stop, None) if later_only else slice(None)
            changes = integers[:, block] - reference[:, block]
            target[:, others].baddbmm_(matrix[:, block, others].mT, changes, alpha=-1)

    def _admitted(
        self, column: int, target: Tensor, old: Tensor, sums: tuple[Tensor, Tensor] | None
    ) -> Float[Tensor, "groups rows"]:
        """The target rounded to the nearest integer that the range and the lane admit; 0 if masked."""
        if self.lanes is None or sums is None:
            return target.round().clamp(-TOP, TOP) * self.keep[:, column]
        lane = self.lanes[:, column, None]
        positive = sums[0].gather(1, lane)[:, 0] - old.clamp_min(0)  # of the other weights in the lane
        negative = sums[1].gather(1, lane)[:, 0] - (-old).clamp_min(0)
        low, high = (negative - LIMIT).clamp_min(-TOP), (LIMIT - positive).clamp_max(TOP)
        new = target.round().clamp(low, high) * self.keep[:, column]
        sums[0].scatter_(1, lane, (positive + new.clamp_min(0))[:, None])
        sums[1].scatter_(1, lane, (negative + (-new).clamp_min(0))[:, None])
        return new


def search_for(
    problem: LeastSquares, keep: Bool[Tensor, "out columns"], lanes: Int[Tensor, "out columns"] | None
) -> Search:
    """The search on a problem, over the weights to keep; others stay zero."""
    order = problem.gram.diagonal(dim1=-2, dim2=-1).argsort(dim=1, descending=True, stable=True)
    columns = order[:, None].expand(problem.gram.shape)
    gram = problem.gram.gather(2, columns).mT.gather(2, columns).contiguous()  # symmetric, so not transposed back
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(1)[:, None]
    used = mean > 0
    eye = torch.eye(gram.shape[-1], dtype=torch.float64)
    damped = gram + torch.where(used, DAMPING * mean, 1.0)[..., None] * eye
    factor = torch.linalg.cholesky(damped.flip(1, 2)).flip(1, 2)  # upper triangular
    compensation = (factor / factor.diagonal(dim1=-2, dim2=-1)[:, None]).triu(1)
    size = torch.maximum(diagonal, torch.where(used, FROZEN * mean, 1.0))
    return Search(
        problem.power,
        order,
        gram,
        _by_column(order, problem.cross),
        compensation.float(),
        (gram / size[:, None] * (1 - eye)).float(),
        size[..., None],
        _by_column(order, keep).float(),
        None if lanes is None else _by_column(order, lanes),
    )


def _by_column(
    order: Int[Tensor, "groups columns"], matrix: Shaped[Tensor, "out columns"]
) -> Shaped[Tensor, "groups columns rows"]:
    """The rows of each group as columns, in this order."""
    by_group = matrix.reshape(len(order), -1, matrix.shape[1])
    return by_group.gather(2, order[:, None].expand(by_group.shape)).mT.contiguous()


def _sums(lanes: Int[Tensor, "groups columns rows"], integers: Tensor) -> tuple[Tensor, Tensor]:
    """Of each lane, the sum of its positive integers and the negated sum of its negative ones."""
    zeros = integers.new_zeros(len(integers), int(lanes.max()) + 1, integers.shape[2])
    return zeros.scatter_add(1, lanes, integers.clamp_min(0)), zeros.scatter_add(1, lanes, (-integers).clamp_min(0))
