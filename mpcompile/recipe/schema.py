"""Recipe: the ordered passes, the target and what surrounds them, from flags or YAML.

Unknown keys are refused. A pass is written as its name, or as its name over its parameters:

    passes:
      - nm-mask: {pattern: 2:4, exclude: [blocks.0.*]}
    target: ort
"""

import hashlib
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_serializer, model_validator

from mpcompile.errors import UsageError
from mpcompile.recipe.strict_yaml import _DECIMAL, _Dumper, _Loader
from mpcompile.system.moved_modules import renamed_names

LONGEST_BYTES = 1_000_000
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


class BenchOptions(Strict):
    """How latency is measured, once for each batch size."""

    batches: tuple[Annotated[int, Field(ge=1, le=LARGEST_BATCH)], ...] = (1, 8)
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 4.0
    threads: Annotated[int, Field(ge=1, le=MOST_THREADS)] | None = None  # the runtime's own choice


class Gates(Strict):
    """What the result has to keep, or the command fails with exit code 6."""

    max_drop: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None  # points of top-1 on held-out images
    engine: bool = False  # that the target builds an engine here, or exit code 7; else a file that was checked will do


class Tune(Strict):
    """A search for the fastest recipe that keeps `gates.max_drop`, starting from this one
    (mpcompile/driver/recipe_search.py).
    """

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
    bench: BenchOptions = BenchOptions()
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


for _tag, (_pattern, _first) in _DECIMAL.items():
    _Loader.add_implicit_resolver(_tag, _pattern, list(_first))
    _Dumper.add_implicit_resolver(_tag, _pattern, list(_first))


__getattr__ = renamed_names(__name__, {"Bench": "BenchOptions"})
