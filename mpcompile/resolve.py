"""Recipe -> the passes and the runtime that it names, checked before anything is computed."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mpcompile.errors import RuntimeMissing, UsageError
from mpcompile.model import NM
from mpcompile.passes import PASSES
from mpcompile.pipeline import Pass, PassManager
from mpcompile.recipe import Recipe, Step, explained
from mpcompile.runtimes import RUNTIMES, Runtime

__all__ = ["PASSES", "RUNTIMES", "Plan", "auto_patterns", "build_pass", "plan_of", "recipe_schema"]


@dataclass(frozen=True)
class Plan:
    """What a recipe comes to, checked before anything is computed."""

    passes: tuple[Pass, ...]
    runtime: Runtime
    idle: str | None = None  # why no engine of the target runs here, where its files are made and checked all the same


def plan_of(recipe: Recipe) -> Plan:
    """The passes and the runtime of a recipe. Raises UsageError or RuntimeMissing."""
    runtime = RUNTIMES.get(recipe.target)
    if runtime is None:
        raise UsageError(f"target {recipe.target!r} is unknown; the targets are {', '.join(RUNTIMES)}")
    missing = runtime.missing()
    if missing and recipe.gates.engine:
        raise RuntimeMissing(f"target {recipe.target}: {missing}, and an engine is required")
    if missing and not runtime.offline:
        raise RuntimeMissing(f"target {recipe.target}: {missing}")
    if refused := runtime.refuses(recipe.precision, recipe.bench.threads):
        raise UsageError(f"target {recipe.target}: {refused}")
    if not recipe.passes:
        raise UsageError("the recipe has no passes; give --pattern, such as --pattern 2:4, or a recipe with passes")
    passes = tuple(build_pass(step) for step in recipe.passes)
    PassManager(passes)  # refuses an order that cannot work
    return Plan(passes, runtime, missing or runtime.idle())


def build_pass(step: Step) -> Pass:
    """The pass that a step of a recipe names, with its parameters checked. Raises UsageError."""
    kind = PASSES.get(step.name)
    if kind is None:
        raise UsageError(f"pass {step.name!r} is unknown; the passes are {', '.join(PASSES)}")
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    unknown = [key for key in step.params if key not in known]
    if unknown:
        raise UsageError(f"pass {step.name} has no {', '.join(map(repr, unknown))}; it has {', '.join(known)}")
    try:
        return TypeAdapter(kind).validate_python(step.params)
    except ValidationError as error:
        raise UsageError(f"pass {step.name}: {explained(error)}") from error


def recipe_schema() -> dict[str, Any]:
    """A JSON Schema of recipes, with the parameters of every pass, for editors."""
    schema = Recipe.model_json_schema()
    steps: list[dict[str, Any]] = [{"enum": list(PASSES)}]
    for name, kind in PASSES.items():
        params = TypeAdapter(kind).json_schema() | {"additionalProperties": False}
        steps.append(
            {"type": "object", "properties": {name: params}, "required": [name], "additionalProperties": False}
        )
    schema["properties"]["passes"]["items"] = {"oneOf": steps}
    schema.get("$defs", {}).pop("Step", None)
    schema["properties"]["target"]["enum"] = list(RUNTIMES)
    return schema


def auto_patterns(target: str, of: int | None = None) -> tuple[NM, ...]:
    """The patterns that `auto` stands for: those that the target has kernels for, or all N:M of one M.

    Without `of`, a target without kernels gets those of M = 4.
    """
    runtime = RUNTIMES.get(target)
    fast = () if runtime is None or of is not None else runtime.auto_patterns()
    return fast or tuple(NM(keep, of or 4) for keep in range(1, of or 4))
