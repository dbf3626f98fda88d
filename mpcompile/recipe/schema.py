"""Recipe: the passes in order, the target, and the settings for images, benchmark and gates; read from YAML.

Unknown keys are errors. A pass is written as its name, or as a mapping from its name to its parameters:

    passes:
      - nm-mask: {pattern: 2:4, exclude: [blocks.0.*]}
    target: ort
"""

import hashlib
import re
import reprlib
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    model_serializer,
    model_validator,
)

from mpcompile.errors import UsageError, did_you_mean
from mpcompile.ir.head import HeadChoice
from mpcompile.ir.pattern import NM
from mpcompile.ir.pattern_choice import Alternatives
from mpcompile.ir.precision import Precision
from mpcompile.recipe.sections import MAX_BATCH, BenchOptions, DataChoice, Gates, Strict, Tune
from mpcompile.recipe.strict_yaml import read_yaml, write_yaml
from mpcompile.recipe.truth_values import described, truth_as_number
from mpcompile.system.moved_modules import renamed_names
from mpcompile.system.user_functions import is_function_name

__all__ = ["BenchOptions", "DataChoice", "Gates", "Recipe", "Step", "Tune", "explained", "read_recipe"]

MAX_BYTES = 1_000_000
DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?", re.ASCII)
MAX_ERRORS_SHOWN = 5  # in one line


class Step(Strict):
    """One pass: its name and its parameters, which the class of the pass checks.

    A pattern in the parameters is text or an NM. It is written as text, so both give the recipe the same hash.
    """

    name: str
    params: dict[str, Any] = {}  # noqa: RUF012 (pydantic copies it)

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
        return {self.name: {key: _pattern_as_text(value) for key, value in self.params.items()}}


def _pattern_as_text(value: Any) -> Any:
    """The value with each pattern in it as text; other values are unchanged."""
    if isinstance(value, NM | Alternatives):
        return str(value)
    return type(value)(map(_pattern_as_text, value)) if type(value) in (list, tuple) else value


def _device(text: str) -> str:
    if text == "mps":
        raise ValueError("the passes solve in float64, which MPS does not have; give cpu")
    if not DEVICE.fullmatch(text):
        raise ValueError(f"{text!r} is no device on which passes run; give auto, cpu, cuda or cuda:N")
    return text


def _head(text: str) -> str:
    HeadChoice.parse(text)  # raises ValueError
    return text


def _function(text: str) -> str:
    if not is_function_name(text):
        raise ValueError(f"{text!r} names no function; give pkg.mod:name")
    return text


def _batch(value: object) -> object:
    return None if value in ("dynamic", None) else value


class Recipe(Strict):
    """Everything that determines the result, except the model and the images."""

    schema_version: Annotated[Literal[1], Field(description="Version of this grammar.")] = 1
    passes: Annotated[
        tuple[Step, ...],
        Field(max_length=100, description="Passes in the order in which they run, each with its parameters."),
    ] = ()
    target: Annotated[str, Field(description="Runtime to build for.")] = "ort"
    precision: Annotated[
        Precision, Field(description="Number format of the ONNX graph. int8 and fp8 need the pass quantize.")
    ] = "fp32"
    device: Annotated[
        str,
        AfterValidator(_device),
        Field(description="Where passes run: auto (a CUDA GPU if there is one), cpu, cuda or cuda:N."),
    ] = "auto"
    batch: Annotated[
        Annotated[int, Field(ge=1, le=MAX_BATCH)] | None,
        BeforeValidator(_batch),
        Field(description="Batch size of the ONNX file. null or dynamic: free."),
    ] = None
    opset: Annotated[
        Annotated[int, Field(ge=18, le=23)] | None,
        Field(description="ONNX opset. null: 20, 21 for int8 and fp8, 22 for bf16."),
    ] = None
    head: Annotated[
        str,
        AfterValidator(_head),
        Field(description="How outputs become a decision: auto, softmax, sigmoid, multilabel, ordinal or values."),
    ] = "auto"
    submodule: Annotated[
        Annotated[str, Field(min_length=1)] | None,
        Field(description="Shell pattern over module names: compress only this part. null: the whole model."),
    ] = None
    metric: Annotated[
        Annotated[str, AfterValidator(_function)] | None,
        Field(description="Your own metric, pkg.mod:fn, in place of accuracy. null: accuracy."),
    ] = None
    data: Annotated[DataChoice, Field(description="Number of images for each purpose, and how they are read.")] = (
        DataChoice()
    )
    bench: Annotated[BenchOptions, Field(description="How latency is measured.")] = BenchOptions()
    gates: Annotated[Gates, Field(description="Limits on held-out images. Beyond them the command fails.")] = Gates()
    tune: Annotated[
        Tune | None,
        Field(description="Search for the fastest recipe within gates.max_drop, such as {evaluations: 8}. null: none."),
    ] = None

    def step(self, name: str) -> Step | None:
        """The first pass with this name, or None."""
        return next((step for step in self.passes if step.name == name), None)

    def with_params(self, name: str, params: Mapping[str, Any]) -> "Recipe":
        """A copy of the recipe. In the passes with this name, `params` replace or add parameters."""
        steps = (
            step.model_copy(update={"params": {**step.params, **params}}) if step.name == name else step
            for step in self.passes
        )
        return self.model_copy(update={"passes": tuple(steps)})

    def without(self, name: str) -> "Recipe":
        """A copy of the recipe without the passes with this name."""
        return self.model_copy(update={"passes": tuple(step for step in self.passes if step.name != name)})

    @property
    def timed_batches(self) -> tuple[int, ...]:
        """The batch sizes to build for and to time: the fixed `batch` if there is one, else `bench.batches`."""
        return self.bench.batches if self.batch is None else (self.batch,)

    @property
    def sha256(self) -> str:
        """SHA-256 of the recipe as JSON, in hexadecimal."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def to_yaml(self) -> str:
        """The recipe as YAML. `from_yaml` reads it back as a recipe with the same hash."""
        return write_yaml(self.model_dump(mode="json"))

    @classmethod
    def from_yaml(cls, text: str, where: str = "recipe") -> "Recipe":
        """The recipe in a YAML (or JSON) text.

        Raises a UsageError that begins with `where` and names each wrong key.
        """
        try:
            content = read_yaml(text)
        except RecursionError as error:
            raise UsageError(f"{where} is nested too deeply for a recipe") from error
        except Exception as error:  # YAMLError, and ValueError, KeyError … for a value that its tag does not allow
            raise UsageError(f"{where} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            raise UsageError(f"{where} holds {type(content).__name__}; a recipe is a mapping with the key passes")
        return cls.checked(content, where)

    @classmethod
    def checked(cls, content: dict[str, Any], where: str = "recipe") -> "Recipe":
        """The recipe in a mapping. Raises a UsageError that begins with `where` and names each wrong key."""
        try:
            recipe = cls.model_validate(content)
        except ValidationError as error:
            raise UsageError(f"{where}: {explained(error)}") from error
        if (place := truth_as_number(content, recipe)) is not None:
            raise UsageError(f"{where}: {described(place)}")
        return recipe


def explained(error: ValidationError) -> str:
    """The errors that pydantic reports, as one line: for each the key, what is wrong, and the value found."""
    errors = error.errors(include_url=False)
    parts = []
    for item in errors[:MAX_ERRORS_SHOWN]:
        key = ".".join(str(part) for part in item["loc"]) or "the whole value"
        near = _near(item["type"], item["loc"], item["input"], item.get("ctx", {}))
        parts.append(f"{key}: {item['msg'].removeprefix('Value error, ')}{near} (found {_shown(item['input'])})")
    more = len(errors) - len(parts)
    return "; ".join(parts) + (f"; and {more} more" if more else "")


def _near(kind: str, key: tuple[int | str, ...], value: object, context: Mapping[str, Any]) -> str:
    """A proposal for a misspelt key or choice, or for text that YAML reads as a value; empty for other errors."""
    if kind == "string_type" and isinstance(value, bool | int | float | date):
        return "; YAML reads words such as on, off, yes and no, numbers and dates as values: put text in quotes"
    if kind == "extra_forbidden" and key:
        models = (Recipe, DataChoice, BenchOptions, Gates, Tune)
        return did_you_mean(str(key[-1]), [name for model in models for name in model.model_fields])
    if kind == "literal_error" and isinstance(value, str):
        return did_you_mean(value, re.findall("'([^']*)'", str(context.get("expected", ""))))
    return ""


def _shown(value: object) -> str:
    """The repr of a value, shortened to about 80 characters."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file. Raises UsageError."""
    try:
        # A pipe would be waited for, and a device never ends.
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UsageError(f"recipe {path} is a pipe or a device; give a file")
        if path.is_file() and path.stat().st_size > MAX_BYTES:
            raise UsageError(f"recipe {path} has {path.stat().st_size:,} bytes; a recipe has at most {MAX_BYTES:,}")
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: the text is not UTF-8, or the path contains a null character
        raise UsageError(f"recipe {path} cannot be read: {error}") from error
    return Recipe.from_yaml(text, str(path))


__getattr__ = renamed_names(__name__, {"Bench": "BenchOptions"})
