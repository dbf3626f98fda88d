"""A schedule of merges found on calibration images: logits moved least, for a share of multiply-accumulates.

Merging r tokens after attention ℓ alone moves the logits by d_ℓ(r), the mean over images of ‖Δ logits‖², measured at a
few r and interpolated. Taking damages to add up, and with the exact cost that a part of the graph has on n tokens (a
polynomial of second degree in n),

    min Σ_ℓ d_ℓ(r_ℓ)  subject to  Σ_ℓ cost_ℓ(n_ℓ) ≤ budget,    n_{ℓ+1} = n_ℓ − r_ℓ,

is solved by dynamic programming over (ℓ, n) for a price of cost, and the price by bisection. Damages do not quite add
up, so the result is then measured against the uniform and the decreasing schedule of the same cost, the best of the
three improved by exchanges between two attentions while that measures better, and so it is never worse than these.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, permutations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from mpcompile.analysis.attention import Attention
from mpcompile.analysis.block_macs import macs_of_parts
from mpcompile.data.images import Split
from mpcompile.errors import PassError
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.ir.token_merging import most_merged
from mpcompile.passes.tome.graph_rewrite import merged
from mpcompile.passes.tome.schedule import decreasing, within_limits
from mpcompile.system.progress import tracked

PROBES = (0.25, 0.5, 1.0)  # of half the tokens: where a damage is measured
EXCHANGES, TRIALS = 4, 3  # rounds at most, and moves that are tried in each
BATCH = 64
BISECTIONS = 40
HIGHEST_PRICE = 1e12  # of all the cost, in damages: nothing is dearer

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Costs:
    """Multiply-accumulates of a model by the tokens in each of its parts (mpcompile/analysis/block_macs.py).

    `coefficients` (2 L, 3) are those of 1, n and n²; `other` is what depends on no tokens.
    """

    coefficients: Float64
    other: float
    tokens: int

    def part(self, part: int, n: Float64 | int) -> Float64:
        """The cost of one part on n tokens."""
        constant, linear, square = self.coefficients[part]
        return np.asarray(constant + linear * n + square * np.square(n))

    def of(self, schedule: Sequence[int]) -> float:
        """Multiply-accumulates with that schedule."""
        left = self.tokens - np.cumsum([0, *schedule])
        parts = range(len(self.coefficients))
        return self.other + sum(float(self.part(part, int(left[(part + 1) // 2]))) for part in parts)


def costs(model: Model, sites: Sequence[Attention], protected: int, patterns: Mapping[str, NM]) -> Costs:
    """How the model's cost depends on its tokens, from its graph on three numbers of them."""
    tokens = sites[0].tokens
    step = max(1, most_merged(tokens, protected) // 2)
    counts = (tokens, tokens - step, tokens - 2 * step)
    rest = [0] * (len(sites) - 1)
    graphs = [model.graph, *(merged(model.graph, [tokens - n, *rest], protected) for n in counts[1:])]
    found = [macs_of_parts(replace(model, graph=graph), patterns) for graph in graphs]
    values = np.array([sums for sums, _ in found])
    coefficients = np.linalg.solve(np.vander(counts, 3, increasing=True).astype(np.float64), values).T
    coefficients[0] = (values[0, 0], 0.0, 0.0)  # the first attention has all tokens, always
    return Costs(coefficients, found[0][1], tokens)


def auto(
    model: Model, images: Split, sites: Sequence[Attention], protected: int, share: float, count: int
) -> tuple[int, ...]:
    """The schedule that leaves `share` of the dense multiply-accumulates and moves logits on `count` images least."""
    if not len(images):
        raise PassError("tome: r: auto measures on calibration images, and there are none; give --data, or an r")
    if most_merged(sites[0].tokens, protected) < 2:
        raise PassError(f"tome: {sites[0].tokens} tokens are too few to share merges out; give an r")
    dense = costs(model, sites, protected, {}).of([0] * len(sites))
    executed, budget = costs(model, sites, protected, model.patterns()), share * dense
    tokens = sites[0].tokens
    most = within_limits([tokens] * len(sites), sites, protected)
    if executed.of(most) > budget:
        raise PassError(
            f"tome: merging as many tokens as can leaves {executed.of(most) / dense:.1%} of the dense "
            f"multiply-accumulates, and macs asks for {share:.1%}; ask for more, or for a sparser pattern"
        )
    if executed.of([0] * len(sites)) <= budget:
        return (0,) * len(sites)
    logits = _Logits(model, images.first(count).to(model.example.dtype), protected)

    def fits(schedule: Sequence[int]) -> bool:
        return executed.of(schedule) <= budget

    shapes = (lambda r: (r,) * len(sites), lambda r: decreasing(r, len(sites)))
    plain = [_first_that_fits(shape, fits, sites, protected) for shape in shapes]
    found = _optimum(_damages(logits, tokens, sites, protected), executed, protected, budget)
    candidates = [schedule for schedule in (*plain, found) if schedule is not None]

    def allowed(schedule: Sequence[int]) -> bool:
        return min(schedule) >= 0 and within_limits(schedule, sites, protected) == tuple(schedule)

    return _exchanged(min(candidates, key=logits.shift), logits.shift, fits, allowed)


class _Logits:
    """How far a schedule moves the logits of some images."""

    def __init__(self, model: Model, pixels: Tensor, protected: int) -> None:
        self._graph, self._pixels, self._protected = model.graph, pixels, protected
        self._unmerged = self._outputs(model.graph)
        self._known: dict[tuple[int, ...], Tensor] = {}

    def moved(self, schedule: tuple[int, ...]) -> Tensor:
        """Δ logits (images, outputs) in float64."""
        if schedule not in self._known:
            merging = merged(self._graph, schedule, self._protected)
            self._known[schedule] = (self._outputs(merging) - self._unmerged).flatten(1).double()
        return self._known[schedule]

    def shift(self, schedule: tuple[int, ...]) -> float:
        """The mean over images of max |Δ logit|, as reports have it."""
        return float(self.moved(schedule).abs().amax(1).mean())

    def damage(self, schedule: tuple[int, ...]) -> float:
        """The mean over images of ‖Δ logits‖²."""
        return float(self.moved(schedule).square().sum(1).mean())

    def _outputs(self, graph: fx.GraphModule) -> Tensor:
        with torch.no_grad():
            return torch.cat([graph(batch) for batch in self._pixels.split(BATCH)])


def _first_that_fits(
    shape: Callable[[int], tuple[int, ...]],
    fits: Callable[[Sequence[int]], bool],
    sites: Sequence[Attention],
    protected: int,
) -> tuple[int, ...] | None:
    """The schedule of that shape with the smallest r that fits."""
    schedules = (within_limits(shape(r), sites, protected) for r in range(1, sites[0].tokens))
    return next((schedule for schedule in schedules if fits(schedule)), None)


def _damages(logits: _Logits, tokens: int, sites: Sequence[Attention], protected: int) -> Float64:
    """d_ℓ(r) for r from 0 to what all tokens allow, a row an attention."""
    most = most_merged(tokens, protected)
    probes = sorted({max(1, round(share * most)) for share in PROBES})
    rows = []
    for place in tracked(range(len(sites)), lambda place: sites[place].name):
        alone = [tuple(r if other == place else 0 for other in range(len(sites))) for r in probes]
        rows.append(np.interp(np.arange(most + 1), [0, *probes], [0.0, *map(logits.damage, alone)]))
    return np.array(rows)


def _optimum(damages: Float64, executed: Costs, protected: int, budget: float) -> tuple[int, ...]:
    """The schedule of least damage whose cost is within the budget, damages taken to add up."""
    low, high = 0.0, 1.0
    while executed.of(_at_price(damages, executed, protected, high)) > budget:
        low, high = high, 4 * high
        if high > HIGHEST_PRICE:
            break
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if executed.of(_at_price(damages, executed, protected, middle)) > budget:
            low = middle
        else:
            high = middle
    return _at_price(damages, executed, protected, high)


def _at_price(damages: Float64, executed: Costs, protected: int, price: float) -> tuple[int, ...]:
    """The schedule of least damage (as a share of all) + price · cost (likewise), by dynamic programming."""
    damages, total = damages / max(float(damages.max()), 1e-300), executed.of([0] * len(damages))
    counts = np.arange(executed.tokens + 1)
    worth = np.zeros(len(counts))  # of the best that can follow, by the tokens that enter
    choices = []
    for place in reversed(range(len(damages))):
        after = worth + price * executed.part(2 * place + 1, counts.astype(np.float64)) / total
        best, choice = np.full(len(counts), np.inf), np.zeros(len(counts), dtype=np.int64)
        for r in range(damages.shape[1]):
            allowed = counts[(counts - protected) // 2 >= r]
            here = damages[place, r] + after[allowed - r]
            better = here < best[allowed]
            best[allowed[better]], choice[allowed[better]] = here[better], r
        worth = best + price * executed.part(2 * place, counts.astype(np.float64)) / total
        choices.append(choice)
    schedule, left = [], executed.tokens
    for choice in reversed(choices):
        schedule.append(int(choice[left]))
        left -= schedule[-1]
    return tuple(schedule)


def _exchanged(
    schedule: tuple[int, ...],
    shift: Callable[[tuple[int, ...]], float],
    fits: Callable[[Sequence[int]], bool],
    allowed: Callable[[Sequence[int]], bool],
) -> tuple[int, ...]:
    """The schedule after merges were moved between attentions as long as logits move less for it.

    Which move is worth a trial is read off what a few merges less at one attention, and more at another, do alone.
    """
    sites = range(len(schedule))
    for _ in range(EXCHANGES):
        best = shift(schedule)
        changes: dict[tuple[int, int], float] = {}
        for site in tracked(sites, "merges of attention {}".format):
            few = max(1, schedule[site] // 4)
            for sign in (-1, 1):
                changed = _changed(schedule, site, sign * few)
                if allowed(changed):
                    changes[site, sign] = shift(changed) - best
        moves = sorted(
            (
                (changes[giver, -1] + changes[taker, 1], giver, taker)
                for giver, taker in permutations(sites, 2)
                if (giver, -1) in changes and (taker, 1) in changes
            )
        )
        moved = (_moved(schedule, giver, taker, fits, allowed) for _, giver, taker in moves)
        trials = list(islice((trial for trial in moved if trial is not None), TRIALS))
        if not trials or shift(nearest := min(trials, key=shift)) >= best:
            break
        schedule = nearest
    return schedule


def _changed(schedule: tuple[int, ...], site: int, by: int) -> tuple[int, ...]:
    """The schedule with so many merges more after one attention."""
    return tuple(r + by if other == site else r for other, r in enumerate(schedule))


def _moved(
    schedule: tuple[int, ...],
    giver: int,
    taker: int,
    fits: Callable[[Sequence[int]], bool],
    allowed: Callable[[Sequence[int]], bool],
) -> tuple[int, ...] | None:
    """The schedule with a quarter of one attention's merges at another, as many there as the budget needs."""
    changed = _changed(schedule, giver, -max(1, schedule[giver] // 4))
    while allowed(changed) and not fits(changed):
        changed = _changed(changed, taker, 1)
    return changed if allowed(changed) else None
