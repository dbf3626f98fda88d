"""Passes and runtimes that are given in Python: recorded in the recipe, checked, and used in a whole run."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from torch import Tensor

import mpcompile
from mpcompile.data.images import Data
from mpcompile.driver.plugins import given_pass, given_runtime, pass_fault, runtime_fault
from mpcompile.driver.run_plan import build_pass, plan_of, step_of
from mpcompile.errors import UsageError
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.passes import PASSES, MPBudget, NMMask
from mpcompile.pipeline.pass_record import Effect
from mpcompile.recipe.schema import Recipe, Step, read_recipe
from mpcompile.runtimes import Eager, OnnxRuntime
from mpcompile.testing import TinyMLP


@dataclass(frozen=True)
class KeepsModel:
    """Returns the model unchanged. It has a field of each type that a recipe can hold."""

    name: ClassVar[str] = "keeps-model"
    effect: ClassVar[Effect] = Effect.ANALYSIS
    requires: ClassVar[tuple[str, ...]] = ()

    pattern: NM | None = None
    names: tuple[str, ...] = ()
    share: float = 0.5

    def __call__(self, model: Model, data: Data) -> Model:
        return model


class OwnRuntime(Eager):
    """The eager runtime under another name."""

    name: ClassVar[str] = "own-runtime"


def test_given_passes_and_runtime_are_recorded_in_the_recipe() -> None:
    own = KeepsModel(NM(1, 4, 2), ("a", "b"), 0.25)
    plan = plan_of(Recipe(), [NMMask(NM(2, 4)), own], OwnRuntime())
    assert plan.passes == (NMMask(NM(2, 4)), own)
    assert plan.recipe.target == "own-runtime"
    assert plan.recipe.passes[1] == Step(
        name="keeps-model", params={"pattern": "1:4x2", "names": ["a", "b"], "share": 0.25}
    )
    assert plan.origins == {
        "pass keeps-model": "test_given_plugins.KeepsModel, given in Python",
        "target own-runtime": "test_given_plugins.OwnRuntime, given in Python",
    }
    again = Recipe.from_yaml(plan.recipe.to_yaml())
    assert again == plan.recipe
    # The recorded recipe alone is refused by name. With the same passes it gives the same plan, with others none.
    with pytest.raises(
        UsageError, match=r"pass 'keeps-model' is unknown.*entry point 'keeps-model' of mpcompile.passes.*passes="
    ):
        plan_of(again.model_copy(update={"target": "eager"}))
    with pytest.raises(
        UsageError, match=r"target 'own-runtime' is unknown.*'own-runtime' of mpcompile.runtimes.*runtime="
    ):
        plan_of(again)
    assert plan_of(again, plan.passes, OwnRuntime()).passes == plan.passes
    with pytest.raises(
        UsageError, match="names the passes nm-mask, keeps-model, and passes= gives nm-mask, keeps-model: their"
    ):
        plan_of(again, [NMMask(NM(1, 4)), own], OwnRuntime())
    with pytest.raises(UsageError, match="names the passes nm-mask, keeps-model, and passes= gives keeps-model"):
        plan_of(again, [own], OwnRuntime())


@pytest.mark.parametrize("name", PASSES)
def test_every_built_in_pass_is_written_and_read_back(name: str) -> None:
    step = step_of(PASSES[name]())
    assert build_pass(step) == PASSES[name]()
    assert Step.model_validate(json.loads(step.model_dump_json())) == step


@dataclass(frozen=True)
class TensorField(KeepsModel):
    """A pass with a tensor as a field, which no recipe can hold."""

    tensor: Tensor | None = None


@dataclass(frozen=True)
class AnyField(KeepsModel):
    """A pass with a field of any type."""

    hook: Any = None


@dataclass(frozen=True)
class NamedNMMask(KeepsModel):
    """A pass with the name of a built-in one."""

    name: ClassVar[str] = "nm-mask"


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ("nm-mask", "str 'nm-mask' is not a pass: builtins.str: it is not a frozen dataclass"),
        (KeepsModel, r"test_given_plugins.KeepsModel is a class; passes are given as instances, KeepsModel\(\)"),
        (
            NamedNMMask(),
            "test_given_plugins.NamedNMMask has the name of the built-in pass nm-mask; rename it",
        ),
        (
            TensorField(),
            "TensorField: its fields cannot be written into a recipe .*use numbers, text, patterns, or tuples of these",
        ),
    ],
)
def test_objects_that_are_no_pass_are_refused(given: object, error: str) -> None:
    with pytest.raises(UsageError, match=error):
        given_pass(given)


@pytest.mark.parametrize(
    ("step", "error"),
    [
        (AnyField(hook=print), "pass keeps-model cannot be written into a recipe: "),
        (
            AnyField(hook=(1, 2)),
            r"pass keeps-model: hook is \(1, 2\), but a recipe would read it as \[1, 2\]; give that value",
        ),
    ],
)
def test_a_field_that_a_recipe_reads_as_another_value_is_refused(step: KeepsModel, error: str) -> None:
    with pytest.raises(UsageError, match=error):
        step_of(step)


def test_text_in_place_of_a_pattern_is_refused_without_type_checking() -> None:
    code = (
        "from mpcompile.passes import MPBudget, NMMask\nfrom mpcompile.driver.run_plan import step_of\n"
        "from mpcompile.errors import UsageError\n"
        "for step in (NMMask(pattern='2:4'), MPBudget(patterns=['2:4'])):\n"
        "    try:\n        step_of(step)\n    except UsageError as error:\n        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert (
        first
        == "pass nm-mask: pattern is '2:4', but a recipe would read it as NM(keep=2, of=4, rows=1); give that value"
    )
    assert second.startswith("pass mp-budget: patterns is ['2:4'], but a recipe would read it as (NM(")
    assert MPBudget((NM(2, 4),)) == build_pass(step_of(MPBudget((NM(2, 4),))))


class Unfrozen(KeepsModel):
    """A subclass that is not a dataclass itself."""


@dataclass(frozen=True)
class NoFields:
    """A dataclass without the members of a pass."""


@dataclass(frozen=True)
class TextEffect(KeepsModel):
    """A pass whose effect is text."""

    effect: ClassVar[str] = "lossy"  # type: ignore[assignment]


@dataclass(frozen=True)
class ListRequires(KeepsModel):
    """A pass whose requires is a list."""

    requires: ClassVar[list[str]] = []  # type: ignore[assignment]


@dataclass(frozen=True)
class NotCallable:
    """A pass without __call__."""

    name: ClassVar[str] = "not-callable"
    effect: ClassVar[Effect] = Effect.LOSSY
    requires: ClassVar[tuple[str, ...]] = ()


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        (KeepsModel, None),
        (3, "it is int 3; a pass is a frozen dataclass"),
        (str, "it is not a frozen dataclass"),
        (NoFields, "its name is not a non-empty string"),
        (TextEffect, "its effect is not one of Effect.ANALYSIS, EXACT and LOSSY"),
        (ListRequires, "its requires is not a tuple of the names of passes that must run before it"),
        (NotCallable, "it has no __call__(model, data)"),
    ],
)
def test_the_fault_of_a_pass_class_is_named(kind: object, fault: str | None) -> None:
    assert pass_fault(kind) == fault


@dataclass(frozen=True)
class Configured(OwnRuntime):
    """A runtime that is a dataclass with a field."""

    cores: int = 4


class NamedOrt(Eager):
    """A runtime with the name of a built-in one."""

    name: ClassVar[str] = "ort"


def test_objects_that_are_no_runtime_are_refused() -> None:
    assert given_runtime(OnnxRuntime()) is None
    assert given_runtime(Configured(8)) == "test_given_plugins.Configured as Configured(cores=8), given in Python"
    with pytest.raises(UsageError, match=r"OwnRuntime is a class; a runtime is given as an instance, OwnRuntime\(\)"):
        given_runtime(OwnRuntime)
    with pytest.raises(UsageError, match="int 3 is not a runtime: it lacks auto_patterns, build"):
        given_runtime(3)
    with pytest.raises(UsageError, match="NamedOrt has the name of the built-in target ort; rename it"):
        given_runtime(NamedOrt())
    assert runtime_fault(OwnRuntime()) is None


def test_a_compile_with_a_given_pass_and_runtime(tmp_path: Path) -> None:
    class Net(TinyMLP):
        pretrained_cfg = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,)}  # noqa: RUF012

    artifact = mpcompile.compile(
        Net(),
        Recipe.checked({"bench": {"batches": [1], "seconds": 0.05}}),
        passes=[NMMask(NM(2, 4)), KeepsModel(share=0.75)],
        runtime=OwnRuntime(),
        output=tmp_path / "out",
    )
    assert read_recipe(tmp_path / "out" / "recipe.yaml") == artifact.recipe == artifact.report.recipe
    assert artifact.recipe.passes[1].params == {"pattern": None, "names": [], "share": 0.75}
    assert artifact.report.environment["pass keeps-model"] == "test_given_plugins.KeepsModel, given in Python"
    assert artifact.report.environment["target own-runtime"] == "test_given_plugins.OwnRuntime, given in Python"
    assert [record.name for record in artifact.report.passes] == ["nm-mask", "keeps-model"]
    with pytest.raises(UsageError, match="target 'own-runtime' is unknown"):
        artifact.load("engine")
    with pytest.raises(
        UsageError, match=r"the model was a Net, which no report can build by name; pass an instance with model="
    ):
        artifact.load("torch")
    assert type(artifact.load("torch", model=Net())) is Net
    # OwnRuntime inherits graph_engine, so the module is captured for it.
    engine = artifact.load("engine", runtime=OwnRuntime(), model=Net())
    assert engine(np.zeros((2, 1, 8, 8), np.float32)).shape == (2, 10)
