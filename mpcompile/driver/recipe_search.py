"""The search for the fastest model within a loss of accuracy: which recipes are tried, in which order, what was found.

A recipe that may be tuned has some freedom: several patterns, a budget that decides how much is masked, tokens that
merge. Each pattern and each way of giving that freedom back is a path of recipes from the one as written (strength 1)
towards the dense model (strength 0):

- masks: the budget leaves more multiply-accumulates;
- tokens: fewer tokens merge;
- both together.

Along a path speed falls and accuracy rises, or so it is taken, and the strongest recipe that holds is found by halving:
strength 1 first, then the middle of what is still open, down to steps of an eighth. Paths take turns, strongest open
recipe first, until all are done or as many recipes were tried as allowed. The search is deterministic.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpcompile.errors import UsageError
from mpcompile.ir.pattern import NM
from mpcompile.recipe.schema import Recipe, Step
from mpcompile.report.search_schema import Point

STEPS = 8  # along a path


@dataclass(frozen=True)
class Candidate:
    """A recipe to try, and what is special about it."""

    name: str
    recipe: Recipe


@dataclass(frozen=True)
class StrengthPath:
    """Recipes by strength: `at` a number of eighths, from 1 to STEPS."""

    name: str
    at: Callable[[int], Candidate]


def held(drop: float, error: float, limit: float) -> bool:
    """Whether a loss is within the limit: with its standard error, since the images that tell of it are few."""
    return drop + error <= limit


def search(
    paths: Sequence[StrengthPath], evaluate: Callable[[Candidate], Point], allowed: int, first: Sequence[Candidate] = ()
) -> tuple[tuple[Candidate, Point], ...]:
    """Every candidate tried, with what was found, at most `allowed` of them; those of `first` before the paths."""
    tried: dict[str, tuple[Candidate, Point]] = {}

    def ask(candidate: Candidate) -> Point | None:
        """What is known of a recipe, or None where it would take one evaluation too many."""
        key = candidate.recipe.sha256
        if key not in tried:
            if len(tried) >= allowed:
                return None
            tried[key] = candidate, evaluate(candidate)
        return tried[key][1]

    for candidate in first:
        ask(candidate)
    turns = [_halving(path, ask) for path in paths]
    while turns:
        turns = [turn for turn in turns if next(turn, None) is not None]
    return tuple(tried.values())


def _halving(path: StrengthPath, ask: Callable[[Candidate], Point | None]) -> Iterator[bool]:
    """Finds the strongest recipe of a path that holds, one evaluation at a time."""
    low, high = 0, STEPS + 1  # low holds (or is the dense model), high does not
    place = STEPS
    while high - low > 1:
        point = ask(path.at(place))
        if point is None:
            return
        low, high = (place, high) if point.holds else (low, place)
        place = (low + high) // 2
        yield True


def fastest(tried: Sequence[tuple[Candidate, Point]]) -> tuple[Candidate, Point]:
    """The fastest of those that hold; where none does, the one that lost least. Raises UsageError where all failed."""
    holding = [pair for pair in tried if pair[1].holds]
    if holding:
        return max(holding, key=lambda pair: pair[1].speed)
    measured = [pair for pair in tried if pair[1].drop is not None]
    if not measured:
        reasons = "; ".join(dict.fromkeys(str(point.failed) for _, point in tried))
        raise UsageError(f"tune: none of the {len(tried)} recipes tried made a model: {reasons}")
    return min(measured, key=lambda pair: pair[1].drop or 0.0)


def paths_of(recipe: Recipe, least: Callable[[Recipe], float]) -> tuple[StrengthPath, ...]:
    """Every path that a recipe's freedom allows. `least` tells which share of multiply-accumulates a recipe leaves.

    Raises UsageError where there is no freedom.
    """
    budget, tome = recipe.step("mp-budget"), recipe.step("tome")
    if budget is None and tome is None:
        raise UsageError(
            "tune: the recipe has nothing to search over; give it a budget (mp-budget, as --pattern does) or token "
            "merging (--tome)"
        )
    paths: list[StrengthPath] = []
    for name, base in _by_pattern(recipe):
        floor = None if budget is None else least(base)
        ways = [(budget is not None, False), (False, tome is not None), (budget is not None, tome is not None)]
        for masks, tokens in dict.fromkeys(way for way in ways if any(way)):
            what = " and ".join(word for word, given in (("masks", masks), ("tokens", tokens)) if given)
            paths.append(StrengthPath(f"{name}{what}", _along(base, name, floor if masks else None, tokens)))
    return tuple(paths)


def _by_pattern(recipe: Recipe) -> list[tuple[str, Recipe]]:
    """The recipe once for each pattern that its budget may give, where that mixes none."""
    budget = recipe.step("mp-budget")
    patterns: Sequence[Any] = () if budget is None else budget.params.get("patterns", ())
    if budget is None or budget.params.get("macs") is not None or len(patterns) < 2:
        return [("", recipe)]
    spelt = dict.fromkeys(str(NM.parse(str(pattern))) for pattern in patterns)
    return [(f"{text}, ", recipe.with_params("mp-budget", {"patterns": [text]})) for text in spelt]


def _along(base: Recipe, prefix: str, floor: float | None, tokens: bool) -> Callable[[int], Candidate]:
    """The candidates of one path: `floor` is the share of multiply-accumulates at strength 1, where masks go back."""

    def at(place: int) -> Candidate:
        recipe, said = base, []
        if floor is not None:
            macs = floor + (1 - floor) * (1 - place / STEPS)
            if place < STEPS:
                recipe = recipe.with_params("mp-budget", {"macs": round(macs, 6)})
                said.append(f"MACs {macs:.2f}")
        if tokens and place < STEPS:
            changed = weaker(recipe.step("tome"), place / STEPS)
            recipe = recipe.with_params("tome", changed)
            said.append(f"tokens {place}/{STEPS}")
        return Candidate(f"{prefix}{', '.join(said) or 'as written'}", recipe)

    return at


def weaker(step: Step | None, strength: float) -> Mapping[str, Any]:
    """Parameters of token merging that merges this share of what the step does."""
    params = {} if step is None else step.params
    r = params.get("r", 8)
    if r == "auto":
        return {"macs": round(1 - (1 - float(params["macs"])) * strength, 6)}
    number, _, kind = str(r).partition(":")
    if isinstance(r, list | tuple) or "," in number:
        each = r if isinstance(r, list | tuple) else number.split(",")
        return {"r": [int(int(value) * strength) for value in each]}
    scaled = int(int(number) * strength)
    return {"r": f"{scaled}:{kind}" if kind else scaled}
