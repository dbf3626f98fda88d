"""Finds the schedule of merges with the smallest logit shift on calibration images, within a budget of MACs.

The damage d_ℓ(r) of merging r tokens after attention ℓ alone is the mean over images of ‖Δ logits‖². It is measured at
a few r and interpolated. Assuming that damages add up, and with the exact cost of each part of the graph on n tokens (a
quadratic polynomial in n),

    min Σ_ℓ d_ℓ(r_ℓ)  subject to  Σ_ℓ cost_ℓ(n_ℓ) ≤ budget,    n_{ℓ+1} = n_ℓ − r_ℓ,

is solved by dynamic programming over (ℓ, n) for a given price of cost; the price is found by bisection. Damages do not
quite add up. The result is therefore measured against the uniform and the decreasing schedule of the same cost, and the
best of the three is improved by moving merges from one attention to another while the measured shift falls. So it is
never worse than those two.
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
from mpcompile.ir.batch import primary
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.ir.token_merging import most_merged
from mpcompile.passes.tome.graph_rewrite import with_merging
from mpcompile.passes.tome.schedule import decreasing, within_limits
from mpcompile.system.progress import tracked

PROBED_SHARES = (0.25, 0.5, 1.0)  # damages are measured at these shares of the most merges
EXCHANGES, TRIALS = 4, 3  # most rounds of exchanges, and moves tried in each
BATCH = 64
BISECTIONS = 40
HIGHEST_PRICE = 1e12  # upper end of the search for the price

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Costs:
    """MACs of a model as a function of the number of tokens n in each of its parts.

    The L attentions give 2 L parts: each attention, and the nodes between it and the next one
    (mpcompile/analysis/block_macs.py). `coefficients` (2 L, 3) are those of 1, n and n²; `other` are the MACs outside
    all parts; `tokens` is the number of tokens without merging.
    """

    coefficients: Float64
    other: float
    tokens: int

    def part(self, part: int, n: Float64 | int) -> Float64:
        """The MACs of one part on n tokens."""
        constant, linear, square = self.coefficients[part]
        return np.asarray(constant + linear * n + square * np.square(n))

    def of(self, schedule: Sequence[int]) -> float:
        """The MACs of the model with this schedule."""
        left = self.tokens - np.cumsum([0, *schedule])
        parts = range(len(self.coefficients))
        return self.other + sum(float(self.part(part, int(left[(part + 1) // 2]))) for part in parts)


def costs(model: Model, attentions: Sequence[Attention], protected: int, patterns: Mapping[str, NM]) -> Costs:
    """The cost polynomials of a model, fitted to its exact MACs at three numbers of tokens."""
    tokens = attentions[0].tokens
    step = max(1, most_merged(tokens, protected) // 2)
    counts = (tokens, tokens - step, tokens - 2 * step)
    rest = [0] * (len(attentions) - 1)
    graphs = [model.graph, *(with_merging(model.graph, [tokens - n, *rest], protected) for n in counts[1:])]
    found = [macs_of_parts(replace(model, graph=graph), patterns) for graph in graphs]
    values = np.array([sums for sums, _ in found])
    coefficients = np.linalg.solve(np.vander(counts, 3, increasing=True).astype(np.float64), values).T
    coefficients[0] = (values[0, 0], 0.0, 0.0)  # the first attention always has all tokens
    return Costs(coefficients, found[0][1], tokens)


def require_images(images: Split) -> None:
    """Raises PassError if there are no calibration images to search a schedule on."""
    if not len(images):
        raise PassError("tome: r: auto measures on calibration images, and there are none; give --data, or an r")


def search_schedule(
    model: Model, images: Split, attentions: Sequence[Attention], protected: int, share: float, count: int
) -> tuple[int, ...]:
    """The schedule with the smallest logit shift on `count` images that leaves `share` of the dense MACs.

    Raises PassError without calibration images, or if no schedule reaches the share.
    """
    require_images(images)
    if most_merged(attentions[0].tokens, protected) < 2:
        raise PassError(f"tome: {attentions[0].tokens} tokens are too few to search for a schedule; give an r")
    dense = costs(model, attentions, protected, {}).of([0] * len(attentions))
    executed, budget = costs(model, attentions, protected, model.patterns()), share * dense
    tokens = attentions[0].tokens
    most = within_limits([tokens] * len(attentions), attentions, protected)
    if executed.of(most) > budget:
        raise PassError(
            f"tome: merging as many tokens as possible leaves {executed.of(most) / dense:.1%} of the dense "
            f"multiply-accumulates, and macs asks for {share:.1%}; raise macs, or use a sparser pattern"
        )
    if executed.of([0] * len(attentions)) <= budget:
        return (0,) * len(attentions)
    logits = _Logits(model, images.first(count).to(model.example.dtype), protected)

    def fits(schedule: Sequence[int]) -> bool:
        return executed.of(schedule) <= budget

    shapes = (lambda r: (r,) * len(attentions), lambda r: decreasing(r, len(attentions)))
    plain = [_first_that_fits(shape, fits, attentions, protected) for shape in shapes]
    found = _optimum(_damages(logits, tokens, attentions, protected), executed, protected, budget)
    candidates = [schedule for schedule in (*plain, found) if schedule is not None]

    def allowed(schedule: Sequence[int]) -> bool:
        return min(schedule) >= 0 and within_limits(schedule, attentions, protected) == tuple(schedule)

    return _improved_by_exchanges(min(candidates, key=logits.shift), logits.shift, fits, allowed)


class _Logits:
    """Measures the logit shift of schedules on a fixed set of images."""

    def __init__(self, model: Model, pixels: Tensor, protected: int) -> None:
        self._graph, self._pixels, self._protected = model.graph, pixels, protected
        self._unmerged = self._outputs(model.graph)
        self._known: dict[tuple[int, ...], Tensor] = {}

    def moved(self, schedule: tuple[int, ...]) -> Tensor:
        """Δ logits (images, outputs) in float64."""
        if schedule not in self._known:
            merging = with_merging(self._graph, schedule, self._protected)
            self._known[schedule] = (self._outputs(merging) - self._unmerged).flatten(1).double()
        return self._known[schedule]

    def shift(self, schedule: tuple[int, ...]) -> float:
        """The logit shift: the mean over images of max |Δ logit|, as in reports."""
        return float(self.moved(schedule).abs().amax(1).mean())

    def damage(self, schedule: tuple[int, ...]) -> float:
        """The mean over images of ‖Δ logits‖²."""
        return float(self.moved(schedule).square().sum(1).mean())

    def _outputs(self, graph: fx.GraphModule) -> Tensor:
        with torch.no_grad():
            return torch.cat([primary(graph(batch)) for batch in self._pixels.split(BATCH)])


def _first_that_fits(
    shape: Callable[[int], tuple[int, ...]],
    fits: Callable[[Sequence[int]], bool],
    attentions: Sequence[Attention],
    protected: int,
) -> tuple[int, ...] | None:
    """The schedule of this shape with the smallest r that fits the budget; None if none does."""
    schedules = (within_limits(shape(r), attentions, protected) for r in range(1, attentions[0].tokens))
    return next((schedule for schedule in schedules if fits(schedule)), None)


def _damages(logits: _Logits, tokens: int, attentions: Sequence[Attention], protected: int) -> Float64:
    """The damages d_ℓ(r) for r from 0 to the most that all tokens allow; one row for each attention."""
    most = most_merged(tokens, protected)
    probes = sorted({max(1, round(share * most)) for share in PROBED_SHARES})
    rows = []
    for layer in tracked(range(len(attentions)), lambda layer: attentions[layer].name, "attentions"):
        alone = [tuple(r if other == layer else 0 for other in range(len(attentions))) for r in probes]
        rows.append(np.interp(np.arange(most + 1), [0, *probes], [0.0, *map(logits.damage, alone)]))
    return np.array(rows)


def _optimum(damages: Float64, executed: Costs, protected: int, budget: float) -> tuple[int, ...]:
    """The schedule of least damage within the budget, assuming that damages add up."""
    low, high = 0.0, 1.0
    while executed.of(_cheapest_at_price(damages, executed, protected, high)) > budget:
        low, high = high, 4 * high
        if high > HIGHEST_PRICE:
            break
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if executed.of(_cheapest_at_price(damages, executed, protected, middle)) > budget:
            low = middle
        else:
            high = middle
    return _cheapest_at_price(damages, executed, protected, high)


def _cheapest_at_price(damages: Float64, executed: Costs, protected: int, price: float) -> tuple[int, ...]:
    """The schedule of least damage + price · cost, both normalised, by dynamic programming over (ℓ, n)."""
    damages, total = damages / max(float(damages.max()), 1e-300), executed.of([0] * len(damages))
    counts = np.arange(executed.tokens + 1)
    worth = np.zeros(len(counts))  # least damage + price · cost from here on, by the number of tokens that enter
    choices = []
    for layer in reversed(range(len(damages))):
        after = worth + price * executed.part(2 * layer + 1, counts.astype(np.float64)) / total
        best, choice = np.full(len(counts), np.inf), np.zeros(len(counts), dtype=np.int64)
        for r in range(damages.shape[1]):
            allowed = counts[(counts - protected) // 2 >= r]
            here = damages[layer, r] + after[allowed - r]
            better = here < best[allowed]
            best[allowed[better]], choice[allowed[better]] = here[better], r
        worth = best + price * executed.part(2 * layer, counts.astype(np.float64)) / total
        choices.append(choice)
    schedule, left = [], executed.tokens
    for choice in reversed(choices):
        schedule.append(int(choice[left]))
        left -= schedule[-1]
    return tuple(schedule)


def _improved_by_exchanges(
    schedule: tuple[int, ...],
    shift: Callable[[tuple[int, ...]], float],
    fits: Callable[[Sequence[int]], bool],
    allowed: Callable[[Sequence[int]], bool],
) -> tuple[int, ...]:
    """The schedule after moving merges between attentions while the measured logit shift falls.

    Moves are ranked by the measured effects of fewer merges at one attention and of more merges at another.
    """
    attentions = range(len(schedule))
    for _ in range(EXCHANGES):
        best = shift(schedule)
        changes: dict[tuple[int, int], float] = {}
        for attention in tracked(attentions, "merges of attention {}".format, "attentions"):
            few = max(1, schedule[attention] // 4)
            for sign in (-1, 1):
                changed = _changed(schedule, attention, sign * few)
                if allowed(changed):
                    changes[attention, sign] = shift(changed) - best
        moves = sorted(
            (
                (changes[source, -1] + changes[target, 1], source, target)
                for source, target in permutations(attentions, 2)
                if (source, -1) in changes and (target, 1) in changes
            )
        )
        moved = (_moved(schedule, source, target, fits, allowed) for _, source, target in moves)
        trials = list(islice((trial for trial in moved if trial is not None), TRIALS))
        if not trials or shift(nearest := min(trials, key=shift)) >= best:
            break
        schedule = nearest
    return schedule


def _changed(schedule: tuple[int, ...], attention: int, by: int) -> tuple[int, ...]:
    """The schedule with `by` more merges after one attention."""
    return tuple(r + by if other == attention else r for other, r in enumerate(schedule))


def _moved(
    schedule: tuple[int, ...],
    source: int,
    target: int,
    fits: Callable[[Sequence[int]], bool],
    allowed: Callable[[Sequence[int]], bool],
) -> tuple[int, ...] | None:
    """The schedule with a quarter of the source's merges removed, and as many added at the target as the budget needs.

    None if that is not a valid schedule.
    """
    changed = _changed(schedule, source, -max(1, schedule[source] // 4))
    while allowed(changed) and not fits(changed):
        changed = _changed(changed, target, 1)
    return changed if allowed(changed) else None
