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
    BaseModel,
    BeforeValidator,
    ConfigDict,
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
from mpcompile.recipe.strict_yaml import read_yaml, write_yaml
from mpcompile.recipe.truth_values import described, truth_as_number
from mpcompile.system.moved_modules import renamed_names
from mpcompile.system.user_functions import is_function_name

MAX_BYTES = 1_000_000
DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?", re.ASCII)
MAX_BATCH = 65536  # upper bound of a dynamic batch in the exported file
MAX_THREADS = 4096
MAX_ERRORS_SHOWN = 5  # in one line


class Strict(BaseModel):
    """Base of the frozen models here: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Step(Strict):
    """One pass: its name and its parameters, which the class of the pass checks.

    A pattern in the parameters is text or an NM. It is written as text, so both give the recipe the same hash.
    """

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


class DataChoice(Strict):
    """How many images are used for what, and how folders of images are read. The seed decides which images."""

    calibration: Annotated[int, Field(ge=1)] = 256
    validation: Annotated[int, Field(ge=0)] = 256  # for passes that choose between results by a measured loss
    held_out: Annotated[int, Field(ge=1)] | None = None  # None: all
    seed: Annotated[int, Field(ge=0)] = 0
    classes: str | None = None  # path of a file that gives the output of each class folder
    exif: Literal["apply", "ignore"] = "apply"
    alpha: Literal["drop", "white", "black"] = "drop"
    skip_broken: bool = False


class BenchOptions(Strict):
    """How latency is measured: the batch sizes, the seconds of timing for each, and the number of CPU threads."""

    batches: tuple[Annotated[int, Field(ge=1, le=MAX_BATCH)], ...] = (1, 8)
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 4.0
    threads: Annotated[int, Field(ge=1, le=MAX_THREADS)] | None = None  # None: the runtime's own choice


class Gates(Strict):
    """Limits of the result on held-out images. If one does not hold, the command fails.

    The exit code is 6 for `max_drop`, `max_ece` and `max_kl`, 7 for `engine`.
    """

    max_drop: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None  # points of top-1, or of the metric
    # Rise of the expected calibration error above the dense model's, in [0, 1].
    max_ece: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    # Divergence KL(dense ‖ compressed) of the predicted probabilities, mean over images, in nats.
    max_kl: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    dense: bool = True  # with max_drop: fail if the dense model's own accuracy cannot be right
    engine: bool = False  # the target must build an engine on this machine; else a checked file is enough

    @property
    def on_outputs(self) -> bool:
        """Whether any limit is on the outputs for held-out images."""
        return any(limit is not None for limit in (self.max_drop, self.max_ece, self.max_kl))


class Tune(Strict):
    """A search for the fastest recipe whose top-1 drop is within `gates.max_drop`, from this recipe to milder ones.

    mpcompile/driver/recipe_search.py defines the candidates.
    """

    evaluations: Annotated[int, Field(ge=1)] = 8  # largest number of recipes tried


class Recipe(Strict):
    """Everything that determines the result, except the model and the images."""

    schema_version: Literal[1] = 1
    passes: Annotated[tuple[Step, ...], Field(max_length=100)] = ()
    target: str = "ort"
    precision: Precision = "fp32"
    device: Annotated[str, AfterValidator(_device)] = "auto"  # where passes run: auto, cpu, cuda or cuda:N
    batch: Annotated[Annotated[int, Field(ge=1, le=MAX_BATCH)] | None, BeforeValidator(_batch)] = None  # None: dynamic
    opset: Annotated[int, Field(ge=18, le=23)] | None = None  # None: 20, or 22 for bf16
    head: Annotated[str, AfterValidator(_head)] = "auto"  # how outputs become decisions (mpcompile/ir/head.py)
    submodule: Annotated[str, Field(min_length=1)] | None = None  # shell pattern: compress this part of the model
    metric: Annotated[str, AfterValidator(_function)] | None = None  # of the user's own, pkg.mod:fn; replaces accuracy
    data: DataChoice = DataChoice()
    bench: BenchOptions = BenchOptions()
    gates: Gates = Gates()
    tune: Tune | None = None

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
