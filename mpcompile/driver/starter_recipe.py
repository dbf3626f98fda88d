"""A recipe to start from: the passes that fit a few answers, as YAML with every default and a comment on each key."""

import shlex
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from mpcompile.driver.commented_recipe import commented
from mpcompile.driver.quantization import require_consistent_precision
from mpcompile.driver.run_plan import plan_of, step_of
from mpcompile.errors import UsageError
from mpcompile.recipe.overrides import overridden
from mpcompile.recipe.schema import Recipe

PATTERN = "50%"  # half of the weights, in the freest pattern that the target runs at the speed of 2:4


@dataclass(frozen=True, slots=True)
class Answers:
    """What `mpcompile init` asks.

    Attributes:
        model: the model as `compile` takes it; the recipe does not hold it.
        data: the images as `compile` takes them; None for none. The recipe does not hold them.
        target: the runtime to build for.
        precision: the number format of the ONNX graph.
        max_drop: the largest drop of top-1 in percentage points; None for no limit, or without images.
    """

    model: str
    data: str | None = None
    target: str = "ort"
    precision: str = "fp32"
    max_drop: float | None = None


def starter_recipe(answers: Answers) -> Recipe:
    """The recipe for the answers, with every parameter of its passes.

    It is the recipe of `mpcompile MODEL --pattern 50%` with the same options. Raises UsageError if the answers do not
    fit each other.
    """
    if answers.max_drop is not None and answers.data is None:
        raise UsageError("a limit on the loss of accuracy needs labelled images; give --data, or no --max-drop")
    limit = None if answers.max_drop is None else {"max_drop": answers.max_drop}
    recipe = overridden(
        Recipe(),
        budget={"patterns": [PATTERN]},
        permute={},
        mask={},
        restore=limit,
        exact={"drop-unread-tokens": {}},
        evidence={"batch-norm": {}, "confidence": {}, "certify": {}} if answers.data else {},
        top={"target": answers.target, "precision": answers.precision},
        nested={"gates": limit or {}},
    )
    plan = plan_of(recipe)
    require_consistent_precision(plan.recipe, plan.passes, plan.runtime, answers.data is not None)
    return plan.recipe.model_copy(update={"passes": tuple(map(step_of, plan.passes))})


def starter_yaml(recipe: Recipe, answers: Answers) -> str:
    """The recipe as YAML: every key and parameter with its value below a comment from the JSON Schema."""
    title = (
        f"A recipe of mpcompile {version('mpcompile')}: every key and every parameter of its passes. Remove what "
        f"should have its default. Use it: {next_command(answers, Path('recipe.yaml'))}"
    )
    return commented(recipe, title)


def next_command(answers: Answers, recipe: Path) -> str:
    """The command that compiles the model by the recipe."""
    data = [] if answers.data is None else ["--data", answers.data]
    return shlex.join(["mpcompile", answers.model, "--config", str(recipe), *data, "-o", "out"])


def write_starter(recipe: Recipe, answers: Answers, path: Path, force: bool) -> bool:
    """Writes the YAML, and returns whether it replaced a file. Raises UsageError if it exists and `force` is False."""
    require_free(path, force)
    replaced = path.exists()
    try:
        path.write_text(starter_yaml(recipe, answers), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}; give another file with --output") from error
    return replaced


def require_free(path: Path, force: bool) -> None:
    """Raises UsageError if the file exists and `force` does not allow to replace it, or if it is a folder."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give a file, such as --output {path / 'recipe.yaml'}")
    if path.exists() and not force:
        raise UsageError(
            f"{path} exists and was not changed; give --force to replace it, or another file with --output"
        )
