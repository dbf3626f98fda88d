"""RunPlan: a recipe with its passes and its runtime built and checked, before anything is computed."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from mpcompile.driver.densities import with_densities
from mpcompile.driver.pass_descriptions import parameters_of, summary_of
from mpcompile.driver.pass_order import require_order
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
from mpcompile.driver.quantization import with_target_defaults
from mpcompile.errors import RuntimeMissing, UsageError, did_you_mean
from mpcompile.export.onnx_export import Lowered, lower
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.ir.pattern_choice import Alternatives
from mpcompile.ir.precision import QUANTIZED, Precision
from mpcompile.ir.quantization import quantizers
from mpcompile.passes import PASSES
from mpcompile.pipeline.pass_manager import Pass, PassManager
from mpcompile.recipe.schema import Recipe, Step, explained
from mpcompile.recipe.truth_values import described, truth_as_number
from mpcompile.runtimes import RUNTIMES, Build, Engine, Runtime, choice_at, fast_patterns, freest
from mpcompile.runtimes.ort.session import cpu_engine
from mpcompile.system.device import chosen_device

__all__ = [
    "PASSES",
    "RUNTIMES",
    "Known",
    "RunPlan",
    "auto_patterns",
    "build_pass",
    "density_patterns",
    "known",
    "plan_of",
    "recipe_schema",
    "runtime_named",
    "step_of",
]


@dataclass(frozen=True)
class RunPlan:
    """A recipe with its passes and its runtime, checked.

    Attributes:
        recipe: the recipe to record; it includes passes and runtime that were given in Python.
        passes: in the order in which they run.
        runtime: the recipe's target, or the runtime that was given in Python.
        idle: why the target's engines do not run on this machine, although its files can be made and checked; None if
            they run.
        origins: the package or class of each pass and runtime that is not built in, by `pass NAME` and `target NAME`.
    """

    recipe: Recipe
    passes: tuple[Pass, ...]
    runtime: Runtime
    idle: str | None = None
    origins: Mapping[str, str] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """The device that runs the passes. Raises UsageError if this machine does not have it."""
        return chosen_device(self.recipe.device)

    def lower(
        self, model: Model, path: Path, metadata: Mapping[str, str] | None = None, like: Lowered | None = None
    ) -> Lowered:
        """The model as an ONNX file in the recipe's precision, batch and opset. Raises BuildError or MaskError.

        If the recipe is in 8 bits, a model without quantizers, such as the dense one, is written in fp32. `like` is an
        earlier result, perhaps of a model that differs in values only.
        """
        recipe = self.recipe
        in_float = recipe.precision in QUANTIZED and not quantizers(model.graph)
        precision: Precision = "fp32" if in_float else recipe.precision
        return lower(
            model, path, precision=precision, batch=recipe.batch, opset=recipe.opset, metadata=metadata, like=like
        )

    def build_options(self, folder: Path) -> Build:
        """The options of the recipe's engines, whose own files are written to `folder`."""
        return Build(threads=self.recipe.bench.threads, batches=self.recipe.timed_batches, folder=folder)

    def build_engine(self, exported: Lowered, build: Build) -> Engine:
        """The target's engine. If the target is idle, ONNX Runtime on the CPU runs the same file. Raises BuildError."""
        return cpu_engine(exported) if self.idle else self.runtime.build(exported, build)


@dataclass(frozen=True)
class Known:
    """All passes and runtimes that a recipe can name on this machine, by name, built-in ones first."""

    passes: Mapping[str, type[Any]]
    runtimes: Mapping[str, Runtime]
    origins: Mapping[str, str]  # the package of each that is not built in, by `pass NAME` and `target NAME`
    broken: tuple[str, ...]  # a sentence for each installed entry point that cannot be used


def known() -> Known:
    """All known passes and runtimes. This imports every package that offers one."""
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
    """The plan of a recipe, or of passes and a runtime that are given in place of the recipe's.

    Raises UsageError if the recipe does not fit its passes or its target, and RuntimeMissing if the target is not
    installed and either cannot prepare files without it or an engine is required.
    """
    origins: dict[str, str] = {}
    if passes is not None:
        recipe = _with_passes(recipe, passes)
        classes = {step.name: given_pass(step) for step in passes}
        origins |= {f"pass {name}": origin for name, origin in classes.items() if origin}
    if runtime is not None:
        origin = given_runtime(runtime)
        origins |= {f"target {runtime.name}": origin} if origin else {}
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
        recipe = with_densities(with_target_defaults(recipe, runtime), runtime)
        passes = tuple(build_pass(step) for step in recipe.passes)
        offered = {step.name: installed_pass(step.name) for step in recipe.passes if step.name not in PASSES}
        origins |= {f"pass {name}": foreign.origin for name, foreign in offered.items() if foreign}
    PassManager(passes)  # refuses an order that cannot work
    require_order(passes)
    return RunPlan(recipe, tuple(passes), runtime, missing or runtime.idle(), origins)


def _with_passes(recipe: Recipe, passes: Sequence[Pass]) -> Recipe:
    """The recipe with the given passes in it. Raises UsageError if it names other passes or parameters."""
    steps = tuple(map(step_of, passes))
    if recipe.passes:
        recipe_names, given_names = ([step.name for step in row] for row in (recipe.passes, steps))
        same = recipe_names == given_names and all(
            _built(named, type(step)) == step for named, step in zip(recipe.passes, passes, strict=True)
        )
        if not same:
            raise UsageError(
                f"the recipe names the passes {', '.join(recipe_names)}, and passes= gives {', '.join(given_names)}: "
                "their names or parameters differ; leave one of the two out"
            )
    return recipe.model_copy(update={"passes": steps})


def step_of(step: Pass) -> Step:
    """The step of a recipe for a pass, with every field. Raises UsageError if reading it back gives another pass."""
    given_pass(step)
    kind = type(step)
    try:
        params = TypeAdapter(kind).dump_python(step, mode="json", warnings="none")
        read = TypeAdapter(kind).validate_python(params)
    except (PydanticSerializationError, ValidationError) as error:
        reason = explained(error) if isinstance(error, ValidationError) else str(error)
        raise UsageError(f"pass {step.name} cannot be written into a recipe: {reason}") from error
    for name in (row.name for row in dataclasses.fields(kind)):  # type: ignore[arg-type]
        given, read_back = getattr(step, name), getattr(read, name)
        if given != read_back or type(given) is not type(read_back):
            raise UsageError(
                f"pass {step.name}: {name} is {given!r}, but a recipe would read it as {read_back!r}; give that value"
            )
    return Step(name=step.name, params=params)


def runtime_named(name: str) -> Runtime:
    """The runtime of a target, built in or installed. Raises UsageError if the name is unknown."""
    if name in RUNTIMES:
        return RUNTIMES[name]
    if foreign := installed_runtime(name):
        return foreign.value
    near = did_you_mean(name, RUNTIMES)
    raise UsageError(
        f"target {name!r} is unknown; the targets are {', '.join(RUNTIMES)}; "
        f"for a runtime of your own install a package with the entry point {name!r} of {RUNTIME_GROUP}, "
        f"or give runtime= in Python{near}"
    )


def build_pass(step: Step) -> Pass:
    """The pass of a recipe's step. Raises UsageError if its name or a parameter is unknown, or a value is not valid."""
    kind = PASSES.get(step.name)
    if kind is None and (foreign := installed_pass(step.name)):
        kind = foreign.value
    if kind is None:
        near = did_you_mean(step.name, PASSES)
        raise UsageError(
            f"pass {step.name!r} is unknown; the passes are {', '.join(PASSES)}; "
            f"for a pass of your own install a package with the entry point {step.name!r} of {PASS_GROUP}, "
            f"or give passes= in Python{near}"
        )
    return _built(step, kind)


def _built(step: Step, kind: type[Any]) -> Pass:
    """An instance of a pass class with the parameters of a step. Raises UsageError."""
    names = [row.name for row in dataclasses.fields(kind)]
    unknown = [key for key in step.params if key not in names]
    if unknown:
        near = did_you_mean(unknown[0], names)
        raise UsageError(
            f"pass {step.name} has no {', '.join(map(repr, unknown))}; it has {', '.join(names) or 'none'}{near}"
        )
    try:
        built: Pass = TypeAdapter(kind).validate_python(step.params)
    except ValidationError as error:
        raise UsageError(f"pass {step.name}: {explained(error)}") from error
    if (place := truth_as_number(step.params, built)) is not None:
        raise UsageError(f"pass {step.name}: {described(place)}")
    return built


def recipe_schema(known: Known) -> dict[str, Any]:
    """The JSON Schema of recipes, with the parameters of every pass in `known`. Editors use it for completion."""
    schema = Recipe.model_json_schema()
    steps: list[dict[str, Any]] = [{"enum": list(known.passes)}]
    for name, kind in known.passes.items():
        params = TypeAdapter(kind).json_schema() | {"description": summary_of(kind), "additionalProperties": False}
        for parameter, text in parameters_of(kind).items():
            if parameter in params.get("properties", {}):
                params["properties"][parameter]["description"] = text
        steps.append(
            {"type": "object", "properties": {name: params}, "required": [name], "additionalProperties": False}
        )
    schema["properties"]["passes"]["items"] = {"oneOf": steps}
    schema.get("$defs", {}).pop("Step", None)
    schema["properties"]["target"]["enum"] = list(known.runtimes)
    return schema


def auto_patterns(
    target: str, of: int | None = None, precision: Precision = "fp32", rows: int = 1
) -> tuple[NM | Alternatives, ...]:
    """The patterns that `auto` stands for. Raises UsageError if the target is unknown or cannot run the precision.

    With `of`, all N:M with M = `of`. Otherwise one choice for each density that the target runs fast in this precision,
    if `rows` output channels share each pattern; for each quarter if it has no sparse kernels. A layer takes the freest
    pattern of a density that its width allows.
    """
    runtime = _runtime_for(target, precision)
    if of is not None:
        return tuple(NM(keep, of) for keep in range(1, of))
    if fast := fast_patterns(runtime, precision, rows):
        return tuple(freest(runtime, pattern, precision) for pattern in fast)
    return tuple(choice_at(runtime, Fraction(quarters, 4), precision, rows) for quarters in (1, 2, 3))


def density_patterns(target: str, density: Fraction, precision: Precision, rows: int = 1) -> NM | Alternatives:
    """What a density such as 50 % stands for on a target.

    Raises UsageError if the target is unknown, cannot run the precision, or runs no pattern of the density faster than
    dense although it has sparse kernels.
    """
    return choice_at(_runtime_for(target, precision), density, precision, rows)


def _runtime_for(target: str, precision: Precision) -> Runtime:
    """The runtime of a target. Raises UsageError if it is unknown or cannot run the precision."""
    runtime = runtime_named(target)
    if refused := runtime.refuses(precision, None):
        raise UsageError(f"target {target}: {refused}")
    return runtime
