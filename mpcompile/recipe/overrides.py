"""Options of the command line laid over a recipe."""

from typing import Any

from mpcompile.errors import UsageError
from mpcompile.recipe.schema import Recipe, Step


def overridden(
    recipe: Recipe,
    *,
    budget: dict[str, Any],
    permute: dict[str, Any] | None,
    mask: dict[str, Any],
    tome: dict[str, Any] | None = None,
    restore: dict[str, Any] | None = None,
    distill: dict[str, Any] | None = None,
    evidence: dict[str, dict[str, Any]] | None = None,
    top: dict[str, Any],
    nested: dict[str, dict[str, Any]],
) -> Recipe:
    """The recipe with what flags say in place of what it said; None and nothing say nothing.

    `budget`, `permute`, `mask`, `tome`, `restore` and `distill` are parameters of these passes; `top` and `nested` are
    keys of the recipe itself and of its sections. A recipe with neither budget nor mask gets all three at its end,
    where patterns are given; without the permutation where `permute` is None. In one that has only a mask pass, that
    takes the pattern and the choice of layers. `tome` and `distill` are put in behind what comes before them where they
    are said and missing; `restore` only where the recipe gets its passes from flags, as the passes of `evidence` with
    their parameters. Raises UsageError.
    """
    budget = {key: value for key, value in budget.items() if value}
    mask = {key: value for key, value in mask.items() if value}
    order = {key: value for key, value in (permute or {}).items() if value}
    tome = {key: value for key, value in (tome or {}).items() if value is not None}
    steps = list(recipe.passes)
    names = {step.name for step in steps}
    if (budget or mask) and not names & {"mp-budget", "nm-mask"}:
        if "patterns" not in budget:
            flags = ", ".join(f"--{key}" for key in (budget | mask))
            raise UsageError(f"{flags} goes with a pattern; give --pattern too")
        steps += [
            Step(name=name) for name in ("mp-budget", "permute", "nm-mask") if name != "permute" or permute is not None
        ]
    elif budget and "mp-budget" not in names:
        alone = [key for key in ("macs", "signal") if key in budget]
        if alone or len(budget.get("patterns", ())) > 1:
            what = f"--{alone[0]}" if alone else "more than one --pattern"
            raise UsageError(f"{what} goes with a budget; add mp-budget to the recipe's passes")
        mask |= {"pattern" if key == "patterns" else key: value for key, value in budget.items()}
        if "pattern" in mask:
            [mask["pattern"]] = mask["pattern"]
    if tome:
        steps = _with(steps, "tome", after=("mp-budget", "permute", "nm-mask"))
        if tome["r"] != "auto":  # then nothing is left of what the recipe wanted to reach by it
            steps = [_without(step, "macs") if step.name == "tome" else step for step in steps]
    if not recipe.passes and steps:
        steps += [Step(name=name, params=params) for name, params in (evidence or {}).items()]
    if restore and not recipe.passes:  # in a recipe that was given, a limit on the loss is a gate
        steps = _with(steps, "restore", after=("mp-budget", "permute", "nm-mask", "tome", "batch-norm"))
    if distill:
        steps = _with(steps, "distill", after=("mp-budget", "permute", "nm-mask", "tome", "batch-norm", "restore"))
    if permute is None:
        steps = [step for step in steps if step.name != "permute"]
    elif order and all(step.name != "permute" for step in steps):
        raise UsageError(f"--{next(iter(order))} goes with the permutation; add permute to the recipe's passes")
    changes = {"mp-budget": budget, "permute": order, "nm-mask": mask, "tome": tome}
    changes |= {"restore": restore or {}, "distill": distill or {}}
    steps = [step.model_copy(update={"params": {**step.params, **changes.get(step.name, {})}}) for step in steps]
    content = recipe.model_dump(mode="json")
    content["passes"] = [step.model_dump() for step in steps]
    content |= {key: value for key, value in top.items() if value is not None}
    for section, values in nested.items():
        said = {key: value for key, value in values.items() if value is not None}
        if said:
            content[section] = {**(content[section] or {}), **said}
    return Recipe.checked(content, "options")


def _with(steps: list[Step], name: str, after: tuple[str, ...]) -> list[Step]:
    """The steps with one of that name: where it stands, or behind the last of those that come before it."""
    if any(step.name == name for step in steps):
        return steps
    place = max((place + 1 for place, step in enumerate(steps) if step.name in after), default=0)
    return [*steps[:place], Step(name=name), *steps[place:]]


def _without(step: Step, key: str) -> Step:
    """The step without one of its parameters."""
    return step.model_copy(update={"params": {k: value for k, value in step.params.items() if k != key}})
