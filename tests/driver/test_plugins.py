"""Passes and runtimes of others: given in Python, or found by entry points of packages that a test puts on the path."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from commandline import mpcompile as run_command
from torch import Tensor

import mpcompile
from mpcompile.cli import inspect_commands
from mpcompile.data.images import Data
from mpcompile.driver.artifact import Artifact
from mpcompile.driver.doctor import examine
from mpcompile.driver.plugins import given_pass, given_runtime, pass_fault, runtime_fault
from mpcompile.driver.run_plan import build_pass, known, plan_of, recipe_schema, runtime_named, step_of
from mpcompile.errors import UsageError
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.passes import PASSES, MPBudget, NMMask
from mpcompile.pipeline.pass_manager import Effect
from mpcompile.recipe.schema import Recipe, Step, read_recipe
from mpcompile.runtimes import Eager, OnnxRuntime
from mpcompile.testing import TinyMLP

SOURCE = '''
"""What a package of others may hold."""
from dataclasses import dataclass
from typing import ClassVar

import torch
from mpcompile import Data, Effect, Model
from mpcompile.runtimes import Eager
from mpcompile.testing import TinyMLP


@dataclass(frozen=True)
class Halve:
    """Halves all weights, or does what `by` says."""

    name: ClassVar[str] = "halve"
    effect: ClassVar[Effect] = Effect.LOSSY
    requires: ClassVar[tuple[str, ...]] = ()
    by: float = 0.5

    @torch.no_grad()
    def __call__(self, model: Model, data: Data) -> Model:
        for _, layer in model.layers():
            layer.weight.mul_(self.by)
        return model


class Chip(Eager):
    name = "chip"


class Choosy(Eager):
    name = "choosy"

    def __init__(self, card):
        self.card = card


chip, net = Chip(), TinyMLP
'''
Package = Callable[..., Path]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """Puts an installed package on the path: its name, module, and entry points of both groups."""

    def install(
        name: str = "their-package",
        module: str = "their_package",
        source: str = SOURCE,
        passes: Mapping[str, str] | None = None,
        runtimes: Mapping[str, str] | None = None,
    ) -> Path:
        folder = tmp_path / name
        info = folder / f"{name.replace('-', '_')}-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        groups = {"mpcompile.passes": passes or {}, "mpcompile.runtimes": runtimes or {}}
        lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in rows.items()) for group, rows in groups.items()]
        (info / "entry_points.txt").write_text("\n".join(lines))
        (folder / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, module, raising=False)
        return folder

    return install


@dataclass(frozen=True)
class Nothing:
    """Does nothing, and has a field of each kind that recipes hold."""

    name: ClassVar[str] = "nothing"
    effect: ClassVar[Effect] = Effect.ANALYSIS
    requires: ClassVar[tuple[str, ...]] = ()

    pattern: NM | None = None
    names: tuple[str, ...] = ()
    share: float = 0.5

    def __call__(self, model: Model, data: Data) -> Model:
        return model


class TheirChip(Eager):
    """A runtime like eager."""

    name: ClassVar[str] = "their-chip"


# ---- by entry points


def test_a_package_is_loaded_only_when_it_is_named(package: Package) -> None:
    package(passes={"halve": "their_package:Halve"}, runtimes={"chip": "their_package:chip"})
    plan_of(Recipe.checked({"passes": ["nm-mask"]}))
    assert "their_package" not in sys.modules
    plan = plan_of(Recipe.checked({"passes": [{"halve": {"by": 0.25}}], "target": "chip"}))
    assert [(type(step).__name__, step.by) for step in plan.passes] == [("Halve", 0.25)]  # type: ignore[attr-defined]
    assert plan.runtime.name == "chip"
    assert plan.origins == {
        "pass halve": "their-package 1.2 (their_package:Halve)",
        "target chip": "their-package 1.2 (their_package:chip)",
    }
    with pytest.raises(UsageError, match="pass halve has no 'bye'; it has by"):
        build_pass(Step(name="halve", params={"bye": 1}))


def test_a_runtime_may_be_a_class(package: Package) -> None:
    package(runtimes={"chip": "their_package:Chip"})
    assert runtime_named("chip").kernels() == Eager().kernels()


BROKEN = {
    "raises": ("raise OSError('no card')", "their_package:X", "does not load: OSError: no card"),
    "exits": ("raise SystemExit(1)", "their_package:X", "does not load: SystemExit: 1"),
    "lacks it": ("", "their_package:X", "does not load: AttributeError: module 'their_package' has no attribute 'X'"),
    "no class": ("X = 3", "their_package:X", "cannot be used: it is int 3; needed is a class, a frozen dataclass"),
    "other name": (SOURCE, "their_package:Halve", "its name is 'halve', and not that of its entry point"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_pass_breaks_those_alone_who_name_it(package: Package, kind: str) -> None:
    source, value, error = BROKEN[kind]
    package(source=source, passes={"x": value}, runtimes={"y": "their_package:Nowhere"})
    assert plan_of(Recipe.checked({"passes": ["nm-mask"]})).origins == {}
    with pytest.raises(UsageError, match=rf"^pass 'x' of their-package 1.2 \(their_package:\w+\) .*{error}$"):
        build_pass(Step(name="x"))
    found = known()
    assert set(found.passes) == set(PASSES)
    assert [sentence.split(" of ")[0] for sentence in found.broken] == ["pass 'x'", "target 'y'"]
    json.dumps(recipe_schema(found))


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("their_package:Choosy", "cannot be made without arguments: TypeError: .*'card'"),
        ("their_package:Halve", "cannot be used: it lacks auto_patterns, build, has_kernel"),
        ("their_package:chip", "cannot be used: its name is 'chip', and not that of its entry point"),
    ],
)
def test_a_broken_runtime_has_its_reason(package: Package, value: str, error: str) -> None:
    package(runtimes={"y": value})
    with pytest.raises(UsageError, match=rf"^target 'y' of their-package 1.2 \({value}\) {error}"):
        runtime_named("y")


def test_built_in_names_cannot_be_taken(package: Package) -> None:
    package(passes={"nm-mask": "their_package:Halve"}, runtimes={"ort": "their_package:chip"})
    plan = plan_of(Recipe.checked({"passes": ["nm-mask"]}))
    assert isinstance(plan.passes[0], NMMask)
    assert isinstance(plan.runtime, OnnxRuntime)
    assert "their_package" not in sys.modules
    assert known().broken == (
        "pass 'nm-mask' of their-package 1.2 (their_package:Halve) is not used: the name is that of a built-in one",
        "target 'ort' of their-package 1.2 (their_package:chip) is not used: the name is that of a built-in one",
    )


def test_two_packages_that_offer_one_name_are_told_apart_by_the_user(package: Package) -> None:
    package(passes={"halve": "their_package:Halve"})
    package("another", "another", SOURCE, passes={"halve": "another:Halve"})
    with pytest.raises(UsageError, match=r"'halve' is offered by another 1.2 .* and their-package 1.2 .*; uninstall"):
        build_pass(Step(name="halve"))
    assert "halve" not in known().passes
    assert "is offered by" in known().broken[0]


def test_the_commands_that_list_say_whose_it_is(package: Package, capsys: pytest.CaptureFixture[str]) -> None:
    package(passes={"halve": "their_package:Halve", "x": "their_package:X"}, runtimes={"chip": "their_package:chip"})
    inspect_commands.passes()
    told = capsys.readouterr()
    assert "halve (lossy): Halves all weights, or does what `by` says.\n    from their-package 1.2" in told.out
    assert told.err.startswith("mpcompile: pass 'x' of their-package 1.2 (their_package:X) does not load: ")
    assert told.err.count("\n") == 1
    inspect_commands.passes(as_json=True)
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["nm-mask"]["from"] is None
    assert (rows["halve"]["from"], rows["halve"]["parameters"]) == (
        "their-package 1.2 (their_package:Halve)",
        {"by": "0.5"},
    )
    inspect_commands.schema()
    schema = json.loads(capsys.readouterr().out)
    assert "halve" in schema["properties"]["passes"]["items"]["oneOf"][0]["enum"]
    assert schema["properties"]["target"]["enum"][-1] == "chip"
    findings = {row.what: row for row in examine()}
    assert findings["pass halve"].works
    assert "from their-package 1.2" in findings["target chip"].found
    assert not findings["entry point"].works
    assert findings["entry point"].remedy


def test_a_runtime_that_fails_when_it_is_asked_does_not_fail_the_doctor(package: Package) -> None:
    ill = SOURCE + "\n\ndef ill(self):\n    raise OSError('card on fire')\n\n\nChip.missing = ill\n"
    package(source=ill, runtimes={"chip": "their_package:chip"})
    row = next(row for row in examine() if row.what == "target chip")
    assert not row.works
    assert "OSError: card on fire" in row.found


def test_a_package_of_others_the_whole_way(package: Package, tmp_path: Path) -> None:
    """On the command line: their model, their pass, their runtime; then loaded again."""
    package(passes={"halve": "their_package:Halve"}, runtimes={"chip": "their_package:chip"})
    (tmp_path / "r.yaml").write_text("{passes: [nm-mask, halve], target: chip, bench: {batches: [1], seconds: 0.05}}")
    words = ["their_package:net", "--config", "r.yaml", "-o", "out", "--input-size", "1x8x8", "--mean", "0.5"]
    done = run_command(*words, "--std", "0.5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    artifact = Artifact.open(tmp_path / "out")
    assert artifact.report.environment["pass halve"] == "their-package 1.2 (their_package:Halve)"
    assert artifact.report.environment["target chip"] == "their-package 1.2 (their_package:chip)"
    assert "their-package 1.2" in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(UsageError, match=r"the report names their_package:net.*load with allow_factory=True"):
        artifact.load("torch")
    assert type(artifact.load("torch", allow_factory=True)) is TinyMLP


# ---- by instance


def test_passes_given_in_python_stand_in_the_recipe() -> None:
    own = Nothing(NM(1, 4, 2), ("a", "b"), 0.25)
    plan = plan_of(Recipe(), [NMMask(NM(2, 4)), own], TheirChip())
    assert plan.passes == (NMMask(NM(2, 4)), own)
    assert plan.recipe.target == "their-chip"
    assert plan.recipe.passes[1] == Step(
        name="nothing", params={"pattern": "1:4x2", "names": ["a", "b"], "share": 0.25}
    )
    assert plan.origins == {
        "pass nothing": "test_plugins.Nothing, given in Python",
        "target their-chip": "test_plugins.TheirChip, given in Python",
    }
    again = Recipe.from_yaml(plan.recipe.to_yaml())
    assert again == plan.recipe
    # Read again, it names what is needed; with the same passes given it is what it was, with others it is refused.
    with pytest.raises(
        UsageError, match=r"pass 'nothing' is unknown.*entry point 'nothing' of mpcompile.passes.*passes="
    ):
        plan_of(again.model_copy(update={"target": "eager"}))
    with pytest.raises(
        UsageError, match=r"target 'their-chip' is unknown.*'their-chip' of mpcompile.runtimes.*runtime="
    ):
        plan_of(again)
    assert plan_of(again, plan.passes, TheirChip()).passes == plan.passes
    with pytest.raises(UsageError, match="names the passes nm-mask, nothing, and passes= gives nm-mask, nothing with"):
        plan_of(again, [NMMask(NM(1, 4)), own], TheirChip())
    with pytest.raises(UsageError, match="names the passes nm-mask, nothing, and passes= gives nothing"):
        plan_of(again, [own], TheirChip())


@pytest.mark.parametrize("name", PASSES)
def test_every_built_in_pass_is_written_and_read_back(name: str) -> None:
    step = step_of(PASSES[name]())
    assert build_pass(step) == PASSES[name]()
    assert Step.model_validate(json.loads(step.model_dump_json())) == step


@dataclass(frozen=True)
class Opaque(Nothing):
    """Has a field that no recipe holds."""

    tensor: Tensor | None = None


@dataclass(frozen=True)
class Anything(Nothing):
    """Has a field of any type."""

    hook: Any = None


@dataclass(frozen=True)
class Shadow(Nothing):
    """Has a built-in name."""

    name: ClassVar[str] = "nm-mask"


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ("nm-mask", "str 'nm-mask' is no pass: builtins.str: it is not a frozen dataclass"),
        (Nothing, r"test_plugins.Nothing is a class; passes are given as instances, Nothing\(\)"),
        (Shadow(), "test_plugins.Shadow has the name of the built-in pass nm-mask; give it another"),
        (
            Opaque(),
            "Opaque: its fields cannot be written into a recipe .*numbers, text, patterns and tuples of them can",
        ),
    ],
)
def test_what_is_no_pass_is_refused(given: object, error: str) -> None:
    with pytest.raises(UsageError, match=error):
        given_pass(given)


@pytest.mark.parametrize(
    ("step", "error"),
    [
        (Anything(hook=print), "pass nothing cannot be written into a recipe: "),
        (Anything(hook=(1, 2)), r"pass nothing: hook is \(1, 2\), which a recipe reads as \[1, 2\]; give it so"),
    ],
)
def test_a_field_that_a_recipe_would_change_is_refused(step: Nothing, error: str) -> None:
    with pytest.raises(UsageError, match=error):
        step_of(step)


def test_text_for_a_pattern_is_refused_where_annotations_are_not_checked() -> None:
    code = (
        "from mpcompile.passes import MPBudget, NMMask\nfrom mpcompile.driver.run_plan import step_of\n"
        "from mpcompile.errors import UsageError\n"
        "for step in (NMMask(pattern='2:4'), MPBudget(patterns=['2:4'])):\n"
        "    try:\n        step_of(step)\n    except UsageError as error:\n        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first == "pass nm-mask: pattern is '2:4', which a recipe reads as NM(keep=2, of=4, rows=1); give it so"
    assert second.startswith("pass mp-budget: patterns is ['2:4'], which a recipe reads as (NM(")
    assert MPBudget((NM(2, 4),)) == build_pass(step_of(MPBudget((NM(2, 4),))))


class Unfrozen(Nothing):
    """No dataclass of its own."""


@dataclass(frozen=True)
class Bare:
    """Lacks all."""


@dataclass(frozen=True)
class Wordless(Nothing):
    """Its effect is a word."""

    effect: ClassVar[str] = "lossy"  # type: ignore[assignment]


@dataclass(frozen=True)
class Listed(Nothing):
    """Its requires is a list."""

    requires: ClassVar[list[str]] = []  # type: ignore[assignment]


@dataclass(frozen=True)
class Still:
    """Cannot be called."""

    name: ClassVar[str] = "still"
    effect: ClassVar[Effect] = Effect.LOSSY
    requires: ClassVar[tuple[str, ...]] = ()


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        (Nothing, None),
        (3, "it is int 3; needed is a class, a frozen dataclass"),
        (str, "it is not a frozen dataclass"),
        (Bare, "it has no name, a string"),
        (Wordless, "it has no effect, one of Effect.ANALYSIS, EXACT and LOSSY"),
        (Listed, "it has no requires, a tuple of the names of passes that must stand before it"),
        (Still, "it has no __call__(model, data)"),
    ],
)
def test_the_faults_of_passes(kind: object, fault: str | None) -> None:
    assert pass_fault(kind) == fault


@dataclass(frozen=True)
class Configured(TheirChip):
    """A runtime with a field."""

    cores: int = 4


class OrtTwin(Eager):
    """Has a built-in name."""

    name: ClassVar[str] = "ort"


def test_what_is_no_runtime_is_refused() -> None:
    assert given_runtime(OnnxRuntime()) is None
    assert given_runtime(Configured(8)) == "test_plugins.Configured as Configured(cores=8), given in Python"
    with pytest.raises(UsageError, match=r"TheirChip is a class; a runtime is given as an instance, TheirChip\(\)"):
        given_runtime(TheirChip)
    with pytest.raises(UsageError, match="int 3 is no runtime: it lacks auto_patterns, build"):
        given_runtime(3)
    with pytest.raises(UsageError, match="OrtTwin has the name of the built-in target ort; give it another"):
        given_runtime(OrtTwin())
    assert runtime_fault(TheirChip()) is None


def test_given_in_python_the_whole_way(tmp_path: Path) -> None:
    class Net(TinyMLP):
        pretrained_cfg = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,)}  # noqa: RUF012

    artifact = mpcompile.compile(
        Net(),
        Recipe.checked({"bench": {"batches": [1], "seconds": 0.05}}),
        passes=[NMMask(NM(2, 4)), Nothing(share=0.75)],
        runtime=TheirChip(),
        output=tmp_path / "out",
    )
    assert read_recipe(tmp_path / "out" / "recipe.yaml") == artifact.recipe == artifact.report.recipe
    assert artifact.recipe.passes[1].params == {"pattern": None, "names": [], "share": 0.75}
    assert artifact.report.environment["pass nothing"] == "test_plugins.Nothing, given in Python"
    assert artifact.report.environment["target their-chip"] == "test_plugins.TheirChip, given in Python"
    assert [record.name for record in artifact.report.passes] == ["nm-mask", "nothing"]
    with pytest.raises(UsageError, match="target 'their-chip' is unknown"):
        artifact.load("engine")
    with pytest.raises(UsageError, match=r"the model was a Net given in Python.*give a new one, model="):
        artifact.load("torch")
    assert type(artifact.load("torch", model=Net())) is Net
