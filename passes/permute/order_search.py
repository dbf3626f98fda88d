"""Search for the column order in which an N:M pattern keeps the largest score.

Given scores X (rows × columns, C = G M columns), columns are assigned to G groups of M; in each row the N largest
scores of every group are kept. The order within a group does not matter, so this is a partition problem, a hard one for
M > 2. The search has a start and two moves, each from the best partition so far:

- serpentine start: columns by falling total, dealt to the groups in turn, forwards and backwards (Zhang et al., ICLR
  2024), or the given order, whichever keeps more;
- assignment: remove one column from every group and put all of them back optimally. With a column x, a row keeps of a
  group what it keeps of the other M − 1 plus max(0, x − t), where t is the N-th largest of those. So the value of
  column c in group g is Σ_rows max(0, X[r, c] − T[r, g]), and the optimum is a linear assignment problem;
- exchange: the same values give the exact gain of exchanging any two columns, since it changes only two groups; the
  best exchanges that share no group are made at once.

When neither move helps, a few random exchanges are made and the search restarts from there; the best order is kept.

Since max(0, a) = (|a| + a)/2, the sums over rows are 1-norm distances between columns, computed by torch.cdist. Work is
counted in scalar differences, so that a limit on work gives the same result on every machine.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mpcompile.ir.pattern import NM

WIDEST_EXCHANGE = 8192  # columns; the exchange move holds the gains of all pairs in memory
CALL = 5e5  # scalar differences that the fixed cost of one cdist call counts as
PERTURBED_SHARE = 0.1  # share of the columns that a restart exchanges at random


@dataclass(frozen=True, slots=True)
class OrderFound:
    """The result of a search: position i holds the former column order[i].

    `before` and `after` are the scores that the pattern keeps in the given and in the new order; `differences` is the
    work done.
    """

    order: Int[Tensor, " columns"]
    before: float
    after: float
    differences: float


def kept_score(score: Float[Tensor, "rows columns"], pattern: NM) -> float:
    """The sum of the scores that the pattern keeps in the given column order."""
    groups = score.reshape(len(score), -1, pattern.of)
    return float(groups.topk(pattern.keep, dim=-1).values.sum(dtype=torch.float64))


def upper_bound(score: Float[Tensor, "rows columns"], pattern: NM) -> float:
    """The sum of each row's largest scores at the pattern's density, in any columns: no order keeps more."""
    count = score.shape[1] * pattern.keep // pattern.of
    return float(score.topk(count, dim=-1).values.sum(dtype=torch.float64))


def serpentine(score: Float[Tensor, "rows columns"], of: int) -> Int[Tensor, " columns"]:
    """Columns by falling total, dealt to groups of `of` in turn, forwards and backwards."""
    falling = score.sum(0, dtype=torch.float64).argsort(descending=True, stable=True).reshape(of, -1)
    rounds = [columns.flip(0) if index % 2 else columns for index, columns in enumerate(falling)]
    return torch.stack(rounds, 1).reshape(-1)


def search(score: Float[Tensor, "rows columns"], pattern: NM, differences: float, seed: int = 0) -> OrderFound:
    """The best column order found within about `differences` scalar differences; never worse than the given order.

    `seed` is the seed of the random restarts. The number of columns must be a multiple of the pattern's M.
    """
    score = score.contiguous()
    columns = score.shape[1]
    before = kept_score(score, pattern)
    identity = torch.arange(columns)
    if columns <= pattern.of:
        return OrderFound(identity, before, before, 0.0)
    start = serpentine(score, pattern.of)
    starts = [(before, identity), (kept_score(score[:, start], pattern), start)]
    best, best_order = max(starts, key=lambda pair: pair[0])
    state = _Partition(score, pattern, best_order.reshape(-1, pattern.of).clone())
    rng = np.random.default_rng(seed)
    max_failures, failures = max(4, columns // 4), 0
    while state.work < differences and failures < max_failures:
        state.descend(differences)
        now = kept_score(score[:, state.order], pattern)
        failures = 0 if now > best else failures + 1
        if now > best:
            best, best_order = now, state.order.clone()
        if state.work < differences:
            state.groups = best_order.reshape(-1, pattern.of).clone()
            state.perturb(rng)
    # The given order is returned unless its score, summed in float64, is exceeded: float32 distances round.
    return (
        OrderFound(best_order, before, best, state.work)
        if best > before
        else OrderFound(identity, before, before, state.work)
    )


class _Partition:
    """The current partition of the columns into groups, and the work done so far."""

    def __init__(self, score: Tensor, pattern: NM, groups: Tensor) -> None:
        self.columns = score.T.contiguous()  # (columns, rows), the layout that cdist needs
        self.totals = self.columns.sum(1)
        self.pattern = pattern
        self.groups = groups  # (G, M) column indices
        self.work = 0.0

    @property
    def order(self) -> Tensor:
        """The column indices, group after group."""
        return self.groups.reshape(-1)

    def descend(self, limit: float) -> None:
        """Sweeps of assignments until none helps, then exchanges until none helps, or until the work limit."""
        helped = True
        while helped:
            helped = False
            for slot in range(self.pattern.of):
                if self.work < limit:
                    helped |= self._assign(slot)
        while self.work < limit and len(self.columns) <= WIDEST_EXCHANGE and self._exchange():
            pass

    def _values(self, slot: int, candidates: Tensor) -> Tensor:
        """What each group would gain from each candidate in place of its column at `slot`: (candidates, G)."""
        others = torch.cat([self.groups[:, :slot], self.groups[:, slot + 1 :]], 1)
        rest = self.columns[others]  # (G, M − 1, rows)
        threshold = rest.topk(self.pattern.keep, dim=1).values[:, -1].contiguous()
        distance = torch.cdist(self.columns[candidates], threshold, p=1.0)
        # The thresholds cost about four differences for each score, which dominates where groups are few and wide.
        # CALL is the fixed cost of a call of any size.
        self.work += distance.numel() * self.columns.shape[1] + 4 * rest.numel() + CALL
        return (distance + self.totals[candidates][:, None] - threshold.sum(1)[None, :]) / 2

    def _assign(self, slot: int) -> bool:
        """Reassigns the columns at `slot` of all groups optimally; returns whether that gained anything."""
        from scipy.optimize import linear_sum_assignment

        candidates = self.groups[:, slot].clone()
        values = self._values(slot, candidates).double()
        rows, groups = linear_sum_assignment(values.numpy(force=True), maximize=True)
        gain = float(values[rows, groups].sum() - values.diagonal().sum())
        if gain <= 1e-7 * float(values.abs().sum()) / len(values):  # the resolution of float32 distances
            return False
        self.groups[torch.from_numpy(groups), slot] = candidates[torch.from_numpy(rows)]
        return True

    def _exchange(self) -> bool:
        """Makes the best exchanges of two columns that share no group; returns whether any was made."""
        g, m = self.groups.shape
        values = torch.stack([self._values(slot, self.order) for slot in range(m)], -1).reshape(g, m, g, m)
        # values[h, k, g, j]: the column at (h, k) in place of the one at (g, j).
        own = torch.einsum("gjgj->gj", values)
        gains = values + values.permute(2, 3, 0, 1) - own[:, :, None, None] - own[None, None]
        # The best exchange of each pair of groups, then greedily the best pairs of groups.
        by_pair, best_exchange = gains.permute(0, 2, 1, 3).reshape(g, g, m * m).max(-1)
        by_pair = by_pair.triu(1)
        order = by_pair.flatten().argsort(descending=True)[: g * 8]
        smallest_gain = 1e-6 * float(own.mean())
        changed: set[int] = set()
        for index in order.tolist():
            one, other = divmod(index, g)
            if float(by_pair[one, other]) <= smallest_gain:
                break
            if one in changed or other in changed:
                continue
            changed |= {one, other}
            k, j = divmod(int(best_exchange[one, other]), m)
            self.groups[one, k], self.groups[other, j] = self.groups[other, j].clone(), self.groups[one, k].clone()
        return bool(changed)

    def perturb(self, rng: np.random.Generator) -> None:
        """Exchanges PERTURBED_SHARE of the columns at random, to leave a local optimum."""
        order = self.order.clone()
        count = max(4, int(PERTURBED_SHARE * len(order)))
        positions = torch.from_numpy(rng.choice(len(order), min(count, len(order)), replace=False))
        order[positions] = order[positions[torch.from_numpy(rng.permutation(len(positions)))]]
        self.groups = order.reshape(self.groups.shape)
