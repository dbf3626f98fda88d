"""The densities of a recipe, such as 50%, replaced by the patterns that its target runs at the same speed."""

from typing import Any

from mpcompile.ir.pattern_choice import parse_density
from mpcompile.recipe.schema import Recipe
from mpcompile.runtimes import Runtime, choice_at

KEYS = ("pattern", "patterns")  # parameters of passes that hold patterns


def with_densities(recipe: Recipe, runtime: Runtime) -> Recipe:
    """The recipe with patterns in place of densities. Raises UsageError if the target cannot run one of them."""

    def resolved(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(map(resolved, value))
        density = parse_density(value) if isinstance(value, str) else None
        return str(choice_at(runtime, density[0], recipe.precision, density[1])) if density else value

    steps = (
        step.model_copy(update={"params": {key: resolved(v) if key in KEYS else v for key, v in step.params.items()}})
        for step in recipe.passes
    )
    return recipe.model_copy(update={"passes": tuple(steps)})
