"""Recipe -> the passes and the runtime that it names, checked before anything is computed; its files and engines."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from mpcompile.driver.plugins import (
    PASS_GROUP,
    RUNTIME_GROUP,
    given_pass,
    given_runtime,
    installed_pass,
    installed_passes,
    installed_runtime,
    installed_runtimes,
)
from mpcompile.errors import RuntimeMissing, UsageError
from mpcompile.export.onnx_export import Lowered, lower
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.passes import PASSES
from mpcompile.pipeline.pass_manager import Pass, PassManager
from mpcompile.recipe.schema import Recipe, Step, explained
from mpcompile.runtimes import RUNTIMES, Build, Engine, Runtime
from mpcompile.runtimes.ort.session import cpu_engine

__all__ = [
    "PASSES",
    "RUNTIMES",
    "Known",
    "RunPlan",
    "auto_patterns",
    "build_pass",
    "known",
    "plan_of",
    "recipe_schema",
    "runtime_named",
    "step_of",
]


@dataclass(frozen=True)
class RunPlan:
    """What a recipe comes to, checked before anything is computed.

    `recipe` is the one to record: passes and runtime given in Python stand in it. `origins` says of each that is not
    built in whose code it is.
    """

    recipe: Recipe
    passes: tuple[Pass, ...]
    runtime: Runtime
    idle: str | None = None  # why no engine of the target runs here, where its files are made and checked all the same
    origins: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Known:
    """All passes and runtimes that a recipe can name here, built-in ones first, whose code the others are, and a
    sentence for each that is installed and cannot be used.
    """

    passes: Mapping[str, type[Any]]
    runtimes: Mapping[str, Runtime]
    origins: Mapping[str, str]  # by `pass NAME` and `target NAME`
    broken: tuple[str, ...]


def known() -> Known:
    """What can be named; every package that offers a pass or a runtime is loaded."""
    passes, runtimes = installed_passes(), installed_runtimes()
    return Known(
        passes={**PASSES, **{name: foreign.value for name, foreign in passes.found.items()}},
        runtimes={**RUNTIMES, **{name: foreign.value for name, foreign in runtimes.found.items()}},
        origins={
            **{f"pass {name}": foreign.origin for name, foreign in passes.found.items()},
            **{f"target {name}": foreign.origin for name, foreign in runtimes.found.items()},
        },
        broken=(*passes.broken, *runtimes.broken),
    )


def plan_of(recipe: Recipe, passes: Sequence[Pass] | None = None, runtime: Runtime | None = None) -> RunPlan:
    """The passes and the runtime of a recipe, or those given in their place. Raises UsageError or RuntimeMissing."""
    origins: dict[str, str] = {}
    if passes is not None:
        recipe = _with_passes(recipe, passes)
        places = {step.name: given_pass(step) for step in passes}
        origins |= {f"pass {name}": place for name, place in places.items() if place}
    if runtime is not None:
        place = given_runtime(runtime)
        origins |= {f"target {runtime.name}": place} if place else {}
        recipe = recipe.model_copy(update={"target": runtime.name})
    else:
        runtime = runtime_named(recipe.target)
        if recipe.target not in RUNTIMES and (foreign := installed_runtime(recipe.target)):
            origins[f"target {recipe.target}"] = foreign.origin
    missing = runtime.missing()
    if missing and recipe.gates.engine:
        raise RuntimeMissing(f"target {recipe.target}: {missing}, and an engine is required")
    if missing and not runtime.offline:
        raise RuntimeMissing(f"target {recipe.target}: {missing}")
    if refused := runtime.refuses(recipe.precision, recipe.bench.threads):
        raise UsageError(f"target {recipe.target}: {refused}")
    if not recipe.passes:
        raise UsageError("the recipe has no passes; give --pattern, such as --pattern 2:4, or a recipe with passes")
    if passes is None:
        passes = tuple(build_pass(step) for step in recipe.passes)
        offered = {step.name: installed_pass(step.name) for step in recipe.passes if step.name not in PASSES}
        origins |= {f"pass {name}": foreign.origin for name, foreign in offered.items() if foreign}
    PassManager(passes)  # refuses an order that cannot work
    return RunPlan(recipe, tuple(passes), runtime, missing or runtime.idle(), origins)


def _with_passes(recipe: Recipe, passes: Sequence[Pass]) -> Recipe:
    """The recipe with passes given in Python in it. Raises UsageError where it names others."""
    steps = tuple(map(step_of, passes))
    if recipe.passes:
        names = [step.name for step in recipe.passes], [step.name for step in steps]
        same = names[0] == names[1] and all(
            _built(named, type(step)) == step for named, step in zip(recipe.passes, passes, strict=True)
        )
        if not same:
            raise UsageError(
                f"the recipe names the passes {', '.join(names[0])}, and passes= gives {', '.join(names[1])} with "
                "parameters of their own; leave one of them out"
            )
    return recipe.model_copy(update={"passes": steps})


def step_of(step: Pass) -> Step:
    """A pass as a recipe names it, with every field. Raises UsageError where it cannot be read back as the same."""
    given_pass(step)
    kind = type(step)
    try:
        params = TypeAdapter(kind).dump_python(step, mode="json", warnings="none")
        read = TypeAdapter(kind).validate_python(params)
    except (PydanticSerializationError, ValidationError) as error:
        reason = explained(error) if isinstance(error, ValidationError) else str(error)
        raise UsageError(f"pass {step.name} cannot be written into a recipe: {reason}") from error
    for name in (row.name for row in dataclasses.fields(kind)):  # type: ignore[arg-type]
        given, found = getattr(step, name), getattr(read, name)
        if given != found or type(given) is not type(found):
            raise UsageError(f"pass {step.name}: {name} is {given!r}, which a recipe reads as {found!r}; give it so")
    return Step(name=step.name, params=params)


def runtime_named(name: str) -> Runtime:
    """The runtime of a target, built in or installed. Raises UsageError."""
    if name in RUNTIMES:
        return RUNTIMES[name]
    if foreign := installed_runtime(name):
        return foreign.value
    raise UsageError(
        f"target {name!r} is unknown; the targets are {', '.join(RUNTIMES)}; one of another package has to be "
        f"installed with the entry point {name!r} of {RUNTIME_GROUP}, or in Python given as runtime="
    )


def build_pass(step: Step) -> Pass:
    """The pass that a step of a recipe names, with its parameters checked. Raises UsageError."""
    kind = PASSES.get(step.name)
    if kind is None and (foreign := installed_pass(step.name)):
        kind = foreign.value
    if kind is None:
        raise UsageError(
            f"pass {step.name!r} is unknown; the passes are {', '.join(PASSES)}; one of another package has to be "
            f"installed with the entry point {step.name!r} of {PASS_GROUP}, or in Python given with passes="
        )
    return _built(step, kind)


def _built(step: Step, kind: type[Any]) -> Pass:
    """A pass of a class with the parameters of a step. Raises UsageError."""
    known = [row.name for row in dataclasses.fields(kind)]
    unknown = [key for key in step.params if key not in known]
    if unknown:
        raise UsageError(
            f"pass {step.name} has no {', '.join(map(repr, unknown))}; it has {', '.join(known) or 'none'}"
        )
    try:
        built: Pass = TypeAdapter(kind).validate_python(step.params)
    except ValidationError as error:
        raise UsageError(f"pass {step.name}: {explained(error)}") from error
    return built


def recipe_schema(known: Known) -> dict[str, Any]:
    """A JSON Schema of recipes, with the parameters of every pass, for editors."""
    schema = Recipe.model_json_schema()
    steps: list[dict[str, Any]] = [{"enum": list(known.passes)}]
    for name, kind in known.passes.items():
        params = TypeAdapter(kind).json_schema() | {"additionalProperties": False}
        steps.append(
            {"type": "object", "properties": {name: params}, "required": [name], "additionalProperties": False}
        )
    schema["properties"]["passes"]["items"] = {"oneOf": steps}
    schema.get("$defs", {}).pop("Step", None)
    schema["properties"]["target"]["enum"] = list(known.runtimes)
    return schema


def auto_patterns(target: str, of: int | None = None) -> tuple[NM, ...]:
    """The patterns that `auto` stands for: those that the target has kernels for, or all N:M of one M.

    Without `of`, a target without kernels gets those of M = 4.
    """
    fast = runtime_named(target).auto_patterns() if of is None else ()
    return fast or tuple(NM(keep, of or 4) for keep in range(1, of or 4))


def lowered(recipe: Recipe, model: Model, path: Path, metadata: Mapping[str, str] | None = None) -> Lowered:
    """The model as an ONNX file in the recipe's precision, batch and opset. Raises BuildError or MaskError."""
    return lower(model, path, precision=recipe.precision, batch=recipe.batch, opset=recipe.opset, metadata=metadata)


def build_of(recipe: Recipe, folder: Path) -> Build:
    """How the recipe's engines are built; what they need beside the file goes into `folder`."""
    return Build(threads=recipe.bench.threads, batches=recipe.timed_batches, folder=folder)


def engine_of(plan: RunPlan, exported: Lowered, build: Build) -> Engine:
    """The target's engine; what runs nowhere here is judged by what runs the same file. Raises BuildError."""
    return cpu_engine(exported) if plan.idle else plan.runtime.build(exported, build)
