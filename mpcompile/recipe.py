"""Recipe: the ordered passes, the target and what surrounds them, from flags or YAML.

Unknown keys are refused. A pass is written as its name, or as its name over its parameters:

    passes:
      - nm-mask: {pattern: 2:4, exclude: [blocks.0.*]}
    target: ort
"""

import hashlib
import re
import reprlib
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_serializer, model_validator

from mpcompile.errors import UsageError

LONGEST_BYTES = 1_000_000
MOST_VALUES = 100_000  # a recipe has some fifty
LARGEST_BATCH = 65536  # what a free batch is exported for
MOST_THREADS = 4096
MOST_SHOWN = 5  # mistakes in one line


class Strict(BaseModel):
    """A frozen value in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Step(Strict):
    """One pass: its name and its parameters, which the pass itself checks."""

    name: str
    params: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: object) -> object:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict) and len(value) == 1 and "name" not in value:
            [(name, params)] = value.items()
            return {"name": name, "params": params or {}}
        return value

    @model_serializer
    def _to_mapping(self) -> dict[str, Any]:
        return {self.name: self.params}


def _batch(value: object) -> object:
    return None if value in ("dynamic", None) else value


class DataChoice(Strict):
    """How many images are used; which, the seed decides."""

    calibration: Annotated[int, Field(ge=1)] = 256
    validation: Annotated[int, Field(ge=0)] = 256  # for passes that choose by what they measure
    held_out: Annotated[int, Field(ge=1)] | None = None  # all there are
    seed: Annotated[int, Field(ge=0)] = 0


class Bench(Strict):
    """How latency is measured, once for each batch size."""

    batches: tuple[Annotated[int, Field(ge=1, le=LARGEST_BATCH)], ...] = (1, 8)
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 4.0
    threads: Annotated[int, Field(ge=1, le=MOST_THREADS)] | None = None  # the runtime's own choice


class Gates(Strict):
    """What the result has to keep, or the command fails with exit code 6."""

    max_drop: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None  # points of top-1 on held-out images
    engine: bool = False  # that the target builds an engine here, or exit code 7; else a file that was checked will do


class Tune(Strict):
    """A search for the fastest recipe that keeps `gates.max_drop`, starting from this one (mpcompile/tuning.py)."""

    evaluations: Annotated[int, Field(ge=1)] = 8  # recipes that are tried at most


class Recipe(Strict):
    """Everything that decides the result, besides the model and the images."""

    schema_version: Literal[1] = 1
    passes: Annotated[tuple[Step, ...], Field(max_length=100)] = ()
    target: str = "ort"
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    batch: Annotated[Annotated[int, Field(ge=1, le=LARGEST_BATCH)] | None, BeforeValidator(_batch)] = None
    opset: Annotated[int, Field(ge=18, le=23)] | None = None  # 20; 22 for bf16
    data: DataChoice = DataChoice()
    bench: Bench = Bench()
    gates: Gates = Gates()
    tune: Tune | None = None

    def step(self, name: str) -> Step | None:
        """The first pass of that name, or None."""
        return next((step for step in self.passes if step.name == name), None)

    def with_params(self, name: str, params: Mapping[str, Any]) -> "Recipe":
        """The recipe with these parameters of a pass in place of those it had."""
        steps = (
            step.model_copy(update={"params": {**step.params, **params}}) if step.name == name else step
            for step in self.passes
        )
        return self.model_copy(update={"passes": tuple(steps)})

    def without(self, name: str) -> "Recipe":
        """The recipe without the passes of that name."""
        return self.model_copy(update={"passes": tuple(step for step in self.passes if step.name != name)})

    @property
    def timed_batches(self) -> tuple[int, ...]:
        """The batches to build for and to time: a fixed batch has one latency."""
        return self.bench.batches if self.batch is None else (self.batch,)

    @property
    def sha256(self) -> str:
        """A hash of what is written in it."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def to_yaml(self) -> str:
        """The recipe as text that `from_yaml` reads back as the same."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str, where: str = "recipe") -> "Recipe":
        """The recipe in a YAML (or JSON) text. Raises UsageError that names each wrong key."""
        try:
            content = yaml.load(text, _Loader)
        except RecursionError as error:
            raise UsageError(f"{where} is nested too deeply for a recipe") from error
        except Exception as error:  # beside YAMLError, ValueError, KeyError … of values that their tag cannot have
            raise UsageError(f"{where} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            raise UsageError(f"{where} holds {type(content).__name__}; a recipe is a mapping with the key passes")
        return cls.checked(content, where)

    @classmethod
    def checked(cls, content: dict[str, Any], where: str = "recipe") -> "Recipe":
        """The recipe in a mapping. Raises UsageError that names each wrong key."""
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise UsageError(f"{where}: {explained(error)}") from error


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


def explained(error: ValidationError) -> str:
    """What pydantic found, in one line: key, what is wrong, and what was there."""
    parts = []
    found = error.errors(include_url=False)
    for item in found[:MOST_SHOWN]:
        key = ".".join(str(part) for part in item["loc"]) or "the whole"
        parts.append(f"{key}: {item['msg'].removeprefix('Value error, ')} (found {_shown(item['input'])})")
    more = len(found) - len(parts)
    return "; ".join(parts) + (f"; and {more} more" if more else "")


def _shown(value: object) -> str:
    """What was found, in some eighty characters."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)


def read_recipe(path: Path) -> Recipe:
    """The recipe in a file. Raises UsageError."""
    try:
        if (
            path.exists() and not path.is_file() and not path.is_dir()
        ):  # a pipe would be waited for, a device never ends
            raise UsageError(f"recipe {path} is a pipe or a device; give a file")
        if path.is_file() and path.stat().st_size > LONGEST_BYTES:
            raise UsageError(f"recipe {path} has {path.stat().st_size:,} bytes; a recipe has at most {LONGEST_BYTES:,}")
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or no name that a file can have
        raise UsageError(f"recipe {path} cannot be read: {error}") from error
    return Recipe.from_yaml(text, str(path))


_DECIMAL = {
    "tag:yaml.org,2002:int": (re.compile(r"^[-+]?\d+$"), "-+0123456789"),
    "tag:yaml.org,2002:float": (
        re.compile(r"^[-+]?(\d+\.\d*([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.\d+([eE][-+]?\d+)?|\.(inf|nan))$"),
        "-+.0123456789",
    ),
}


class _Loader(yaml.SafeLoader):
    """YAML without its base-60 numbers, in which 2:4 is 124 and not a pattern, and without repeated keys."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (an instance variable in the base class)
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _DECIMAL]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def get_single_node(self) -> yaml.Node | None:
        """The document, or an error where aliases would make more of it than a recipe can mean."""
        node: yaml.Node | None = super().get_single_node()
        if node is not None and _values_in(node, {}) > MOST_VALUES:
            text = f"its aliases spell out more than {MOST_VALUES:,} values, or one holds itself"
            raise yaml.constructor.ConstructorError(None, None, text, node.start_mark)
        return node

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Any, Any]:
        """The mapping, or an error where a key would silently win over an earlier one."""
        if not isinstance(node, yaml.MappingNode):  # one that only its tag calls a mapping
            raise yaml.constructor.ConstructorError(None, None, f"{node.tag} is on what is no mapping", node.start_mark)
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value == "null":
                key.tag = "tag:yaml.org,2002:str"  # a parameter of mp-budget, and never nothing as a key
        seen = set()
        for key in (self.construct_object(key, deep=True) for key, _ in node.value):
            if not isinstance(key, Hashable):
                continue  # refused below, with its place
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is there twice", node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _values_in(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node comes to with every alias spelt out; more than MOST_VALUES where it holds itself."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = MOST_VALUES  # what a node that holds itself sees of itself
        inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + sum(_values_in(part, known) for part in inner)
    return known[id(node)]


class _Dumper(yaml.SafeDumper):
    """Writes what _Loader reads."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers.copy()


for _tag, (_pattern, _first) in _DECIMAL.items():
    _Loader.add_implicit_resolver(_tag, _pattern, list(_first))
    _Dumper.add_implicit_resolver(_tag, _pattern, list(_first))
