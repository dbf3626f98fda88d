"""The search of `tune` for the fastest recipe within an accuracy limit: which recipes are tried, and in which order.

A recipe can be tuned if it has a budget, which decides how much is masked, or token merging. A path is a family of
recipes from the given one (strength 1) towards the dense model (strength 0). There is one set of paths for each pattern
of the budget:

- masks: weaker recipes leave more multiply-accumulates;
- tokens: weaker recipes merge fewer tokens;
- both together.

The search assumes that accuracy rises and speed falls as the strength falls. It finds the strongest recipe of a path
that keeps the limit by bisection: strength 1 first, then the middle of the open interval, in steps of 1/8. Paths are
evaluated in turn, one recipe each, until all have ended or the allowed number of recipes was tried. The search is
deterministic.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpcompile.errors import UsageError
from mpcompile.ir.pattern import NM
from mpcompile.ir.pattern_choice import Alternatives, parse_choice
from mpcompile.recipe.schema import Recipe, Step
from mpcompile.report.search_schema import Point

STEPS = 8  # the strengths of a path are 1/8 to 8/8


@dataclass(frozen=True)
class Candidate:
    """A recipe to try. `name` describes how it differs from the given recipe."""

    name: str
    recipe: Recipe


@dataclass(frozen=True)
class StrengthPath:
    """A family of recipes indexed by strength: `at(step)` is the one of strength step/8, for step 1 to STEPS."""

    name: str
    at: Callable[[int], Candidate]


def within_limit(drop: float, error: float, limit: float) -> bool:
    """Whether drop + error ≤ limit, all in percentage points of top-1.

    `error` is the standard error of the drop. It is added because the drop is measured on few images.
    """
    return drop + error <= limit


def search(
    paths: Sequence[StrengthPath], evaluate: Callable[[Candidate], Point], allowed: int, first: Sequence[Candidate] = ()
) -> tuple[tuple[Candidate, Point], ...]:
    """The candidates that were tried and their measurements, in the order of evaluation.

    Args:
        paths: searched in turn, one candidate each.
        evaluate: measures a candidate. It is called once for each recipe, also if two paths contain it.
        allowed: the largest number of candidates to evaluate.
        first: candidates to evaluate before the paths.
    """
    tried: dict[str, tuple[Candidate, Point]] = {}

    def point_of(candidate: Candidate) -> Point | None:
        """The measurement of a candidate, or None if it would exceed the allowed number of evaluations."""
        key = candidate.recipe.sha256
        if key not in tried:
            if len(tried) >= allowed:
                return None
            tried[key] = candidate, evaluate(candidate)
        return tried[key][1]

    for candidate in first:
        point_of(candidate)
    turns = [_bisection(path, point_of) for path in paths]
    while turns:
        turns = [turn for turn in turns if next(turn, None) is not None]
    return tuple(tried.values())


def _bisection(path: StrengthPath, point_of: Callable[[Candidate], Point | None]) -> Iterator[bool]:
    """Searches the strongest recipe of a path that keeps the limit; yields after each evaluation."""
    low, high = 0, STEPS + 1  # low keeps the limit (0 is the dense model), high does not
    step = STEPS
    while high - low > 1:
        point = point_of(path.at(step))
        if point is None:
            return
        low, high = (step, high) if point.holds else (low, step)
        step = (low + high) // 2
        yield True


def fastest(tried: Sequence[tuple[Candidate, Point]]) -> tuple[Candidate, Point]:
    """The fastest candidate that keeps the limit, or, if none does, the one with the smallest drop.

    Raises UsageError if every candidate failed.
    """
    holding = [pair for pair in tried if pair[1].holds]
    if holding:
        return max(holding, key=lambda pair: pair[1].speed)
    measured = [pair for pair in tried if pair[1].drop is not None]
    if not measured:
        reasons = "; ".join(dict.fromkeys(str(point.failed) for _, point in tried))
        raise UsageError(f"tune: none of the {len(tried)} recipes tried made a model: {reasons}")
    return min(measured, key=lambda pair: pair[1].drop or 0.0)


def paths_of(recipe: Recipe, least: Callable[[Recipe], float]) -> tuple[StrengthPath, ...]:
    """The paths of a recipe: for each pattern of its budget one by masks, one by tokens, one by both, as they apply.

    Args:
        recipe: without `restore`.
        least: returns the share of dense multiply-accumulates, in [0, 1], that a recipe leaves.

    Raises UsageError if the recipe has neither a budget nor token merging.
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
            varied = " and ".join(word for word, used in (("masks", masks), ("tokens", tokens)) if used)
            paths.append(StrengthPath(f"{name}{varied}", _candidates(base, name, floor if masks else None, tokens)))
    return tuple(paths)


def _by_pattern(recipe: Recipe) -> list[tuple[str, Recipe]]:
    """One recipe for each pattern of the budget, with the prefix of its name.

    A budget with `macs` mixes its patterns, and a budget with one pattern has nothing to split: the recipe is returned
    unchanged.
    """
    budget = recipe.step("mp-budget")
    patterns: Sequence[Any] = () if budget is None else budget.params.get("patterns", ())
    if budget is None or budget.params.get("macs") is not None or len(patterns) < 2:
        return [("", recipe)]
    # Text, as in recipe.yaml: the chosen recipe equals the one that is read back.
    texts = dict.fromkeys(
        str(item if isinstance(item, NM | Alternatives) else parse_choice(str(item))) for item in patterns
    )
    return [(f"{text}, ", recipe.with_params("mp-budget", {"patterns": [text]})) for text in texts]


def _candidates(base: Recipe, prefix: str, floor: float | None, tokens: bool) -> Callable[[int], Candidate]:
    """The function from step to candidate of one path.

    Args:
        base: the recipe of strength 1.
        prefix: of the candidates' names.
        floor: the share of dense multiply-accumulates at strength 1; None keeps the masks.
        tokens: whether token merging is weakened.
    """

    def at(step: int) -> Candidate:
        recipe, changes = base, []
        if floor is not None:
            macs = floor + (1 - floor) * (1 - step / STEPS)
            if step < STEPS:
                recipe = recipe.with_params("mp-budget", {"macs": round(macs, 6)})
                changes.append(f"MACs {macs:.2f}")
        if tokens and step < STEPS:
            recipe = recipe.with_params("tome", weaker(recipe.step("tome"), step / STEPS))
            changes.append(f"tokens {step}/{STEPS}")
        return Candidate(f"{prefix}{', '.join(changes) or 'as written'}", recipe)

    return at


def weaker(step: Step | None, strength: float) -> Mapping[str, Any]:
    """Parameters of a `tome` step that merges `strength` times as many tokens as the given step (rounded down)."""
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
