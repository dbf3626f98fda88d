"""The order of columns that lets an N:M pattern keep the most.

Given scores X (rows × columns, C = G M of them), columns are dealt to G groups of M; in each row the N largest of every
group are kept. Within a group order is of no account, so this is a partition problem, and a hard one for M > 2. Three
moves, each from what was best so far:

- serpentine start: columns by falling total, dealt to the groups there and back again (Zhang et al., ICLR 2024), or the
  order as it is, whichever keeps more;
- assignment: take one column out of every group and put all of them back in the best way. A row keeps of a group with
  a column x added what it kept of the other M − 1, plus max(0, x − t), where t is the N-th largest of those. So the
  value of column c in group g is Σ_rows max(0, X[r, c] − T[r, g]), and the best way is a linear assignment;
- exchange: the same values give the gain of exchanging any two columns, exactly, since that concerns two groups alone;
  the best exchanges that share no group are made at once.

When neither helps any more, a few random exchanges are made and it begins again; the best order is kept.

Since max(0, a) = (|a| + a)/2, the sums over rows are distances between columns in the 1-norm, and are taken by
torch.cdist. Work is counted in differences taken, so that a bound on it gives the same result on every machine.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mpcompile.ir.pattern import NM

WIDEST_EXCHANGE = 8192  # columns; the gains of all pairs are held at once
CALL = 5e5  # differences that could be taken in the time of a call that takes none
PERTURBED_SHARE = 0.1  # the share of columns exchanged at random where nothing helps any more


@dataclass(frozen=True, slots=True)
class OrderFound:
    """An order of columns (place i holds the column order[i]), and the kept score with it and without it."""

    order: Int[Tensor, " columns"]
    before: float
    after: float
    differences: float  # the work done


def kept(score: Float[Tensor, "rows columns"], pattern: NM) -> float:
    """What the pattern keeps of the scores in the order that they are in."""
    groups = score.reshape(len(score), -1, pattern.of)
    return float(groups.topk(pattern.keep, dim=-1).values.sum(dtype=torch.float64))


def ideal(score: Float[Tensor, "rows columns"], pattern: NM) -> float:
    """What a row keeps if it may keep any columns, as many as the pattern keeps: no order keeps more."""
    share = score.shape[1] * pattern.keep // pattern.of
    return float(score.topk(share, dim=-1).values.sum(dtype=torch.float64))


def serpentine(score: Float[Tensor, "rows columns"], of: int) -> Int[Tensor, " columns"]:
    """Columns by falling total, dealt to the groups there and back again."""
    falling = score.sum(0, dtype=torch.float64).argsort(descending=True, stable=True).reshape(of, -1)
    rounds = [deal.flip(0) if index % 2 else deal for index, deal in enumerate(falling)]
    return torch.stack(rounds, 1).reshape(-1)


def search(score: Float[Tensor, "rows columns"], pattern: NM, differences: float, seed: int = 0) -> OrderFound:
    """The best order found with about as many differences taken. Never worse than the order given."""
    score = score.contiguous()
    columns = score.shape[1]
    before = kept(score, pattern)
    identity = torch.arange(columns)
    if columns <= pattern.of:
        return OrderFound(identity, before, before, 0.0)
    start = serpentine(score, pattern.of)
    starts = [(before, identity), (kept(score[:, start], pattern), start)]
    best, best_order = max(starts, key=lambda pair: pair[0])
    state = _State(score, pattern, best_order.reshape(-1, pattern.of).clone())
    rng = np.random.default_rng(seed)
    patience, failures = max(4, columns // 4), 0
    while state.work < differences and failures < patience:
        state.descend(differences)
        now = kept(score[:, state.order], pattern)
        failures = 0 if now > best else failures + 1
        if now > best:
            best, best_order = now, state.order.clone()
        if state.work < differences:
            state.groups = best_order.reshape(-1, pattern.of).clone()
            state.shake(rng)
    # Rounding of float32 distances cannot make it worse than it was.
    return (
        OrderFound(best_order, before, best, state.work)
        if best > before
        else OrderFound(identity, before, before, state.work)
    )


class _State:
    """Groups of columns as they stand, and the work done on them."""

    def __init__(self, score: Tensor, pattern: NM, groups: Tensor) -> None:
        self.columns = score.T.contiguous()  # a column a row, as cdist wants them
        self.totals = self.columns.sum(1)
        self.pattern = pattern
        self.groups = groups  # (G, M)
        self.work = 0.0

    @property
    def order(self) -> Tensor:
        """The columns, group after group."""
        return self.groups.reshape(-1)

    def descend(self, limit: float) -> None:
        """Sweeps of assignments until none helps, then exchanges until none helps."""
        helped = True
        while helped:
            helped = False
            for slot in range(self.pattern.of):
                if self.work < limit:
                    helped |= self._assign(slot)
        while self.work < limit and len(self.columns) <= WIDEST_EXCHANGE and self._exchange():
            pass

    def _values(self, slot: int, candidates: Tensor) -> Tensor:
        """What each group would gain by each candidate in the place of its column at `slot`: (candidates, G)."""
        others = torch.cat([self.groups[:, :slot], self.groups[:, slot + 1 :]], 1)
        rest = self.columns[others]  # (G, M − 1, rows)
        threshold = rest.topk(self.pattern.keep, dim=1).values[:, -1].contiguous()
        distance = torch.cdist(self.columns[candidates], threshold, p=1.0)
        # Finding the thresholds costs about four differences a number, most of it where groups are few and wide; and
        # a call costs something however small it is.
        self.work += distance.numel() * self.columns.shape[1] + 4 * rest.numel() + CALL
        return (distance + self.totals[candidates][:, None] - threshold.sum(1)[None, :]) / 2

    def _assign(self, slot: int) -> bool:
        """Takes the column at `slot` out of every group and puts all back in the best way."""
        from scipy.optimize import linear_sum_assignment

        taken = self.groups[:, slot].clone()
        values = self._values(slot, taken).double()
        rows, places = linear_sum_assignment(values.numpy(), maximize=True)
        gain = float(values[rows, places].sum() - values.diagonal().sum())
        if gain <= 1e-7 * float(values.abs().sum()) / len(values):  # float32 distances know no more
            return False
        self.groups[torch.from_numpy(places), slot] = taken[torch.from_numpy(rows)]
        return True

    def _exchange(self) -> bool:
        """Makes the best exchanges of two columns that share no group."""
        g, m = self.groups.shape
        values = torch.stack([self._values(slot, self.order) for slot in range(m)], -1).reshape(g, m, g, m)
        # values[h, k, g, j]: the column at (h, k) in the place of the one at (g, j).
        own = torch.einsum("gjgj->gj", values)
        gains = values + values.permute(2, 3, 0, 1) - own[:, :, None, None] - own[None, None]
        # Of each pair of groups the best exchange, then greedily the best pairs of groups.
        by_pair, which = gains.permute(0, 2, 1, 3).reshape(g, g, m * m).max(-1)
        by_pair = by_pair.triu(1)
        order = by_pair.flatten().argsort(descending=True)[: g * 8]
        least = 1e-6 * float(own.mean())
        busy: set[int] = set()
        for index in order.tolist():
            one, other = divmod(index, g)
            if float(by_pair[one, other]) <= least:
                break
            if one in busy or other in busy:
                continue
            busy |= {one, other}
            k, j = divmod(int(which[one, other]), m)
            self.groups[one, k], self.groups[other, j] = self.groups[other, j].clone(), self.groups[one, k].clone()
        return bool(busy)

    def shake(self, rng: np.random.Generator) -> None:
        """Exchanges some columns at random, to leave a local optimum."""
        flat = self.order.clone()
        count = max(4, int(PERTURBED_SHARE * len(flat)))
        places = torch.from_numpy(rng.choice(len(flat), min(count, len(flat)), replace=False))
        flat[places] = flat[places[torch.from_numpy(rng.permutation(len(places)))]]
        self.groups = flat.reshape(self.groups.shape)
