"""Passes and runtimes of installed packages: the tests put packages with entry points on the path."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from commandline import mpcompile as run_command

from mpcompile.cli import inspect_commands
from mpcompile.driver.artifact import Artifact
from mpcompile.driver.bench import bench
from mpcompile.driver.compare_engines import Settings
from mpcompile.driver.doctor import examine
from mpcompile.driver.follow import follow
from mpcompile.driver.run_plan import build_pass, known, plan_of, recipe_schema, runtime_named
from mpcompile.errors import UsageError
from mpcompile.passes import PASSES, NMMask
from mpcompile.pipeline.ranks import shares_work
from mpcompile.recipe.schema import Recipe, Step
from mpcompile.runtimes import Eager, OnnxRuntime
from mpcompile.testing import TinyMLP

SOURCE = '''
"""The module of an installed package."""
from dataclasses import dataclass
from typing import ClassVar

import torch
from mpcompile import Data, Effect, Model
from mpcompile.runtimes import Eager
from mpcompile.system.distributed import share
from mpcompile.testing import TinyMLP


@dataclass(frozen=True)
class Halve:
    """Multiplies all weights by `by`."""

    name: ClassVar[str] = "halve"
    effect: ClassVar[Effect] = Effect.LOSSY
    requires: ClassVar[tuple[str, ...]] = ()
    by: float = 0.5

    @torch.no_grad()
    def __call__(self, model: Model, data: Data) -> Model:
        for _, layer in model.layers():
            layer.weight.mul_(self.by)
        return model


class Train(Halve):
    name = "train"
    shares_work = True
    runs = []

    def __call__(self, model, data):
        self.runs.append(share().size)
        return super().__call__(model, data)


class Chip(Eager):
    name = "chip"


class NeedsArgument(Eager):
    name = "needs-argument"

    def __init__(self, card):
        self.card = card


chip, net = Chip(), TinyMLP
'''
Package = Callable[..., Path]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """A function that installs a package on the path: its name, module, source, and entry points of both groups."""

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


def test_a_package_is_imported_only_if_a_recipe_names_it(package: Package) -> None:
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


def test_the_entry_point_of_a_runtime_may_be_a_class(package: Package) -> None:
    package(runtimes={"chip": "their_package:Chip"})
    assert runtime_named("chip").kernels() == Eager().kernels()


BROKEN = {
    "raises": ("raise OSError('no card')", "their_package:X", "does not load: OSError: no card"),
    "exits": ("raise SystemExit(1)", "their_package:X", "does not load: SystemExit: 1"),
    "lacks it": ("", "their_package:X", "does not load: AttributeError: module 'their_package' has no attribute 'X'"),
    "no class": ("X = 3", "their_package:X", "cannot be used: it is int 3; a pass is a frozen dataclass"),
    "other name": (SOURCE, "their_package:Halve", "its name is 'halve', which differs from its entry point"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_pass_fails_only_recipes_that_name_it(package: Package, kind: str) -> None:
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
        ("their_package:NeedsArgument", "cannot be made without arguments: TypeError: .*'card'"),
        ("their_package:Halve", "cannot be used: it lacks auto_patterns, build, has_kernel"),
        ("their_package:chip", "cannot be used: its name is 'chip', which differs from its entry point"),
    ],
)
def test_a_broken_runtime_is_refused_with_the_reason(package: Package, value: str, error: str) -> None:
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
        "pass 'nm-mask' of their-package 1.2 (their_package:Halve) is not used: a built-in pass has this name",
        "target 'ort' of their-package 1.2 (their_package:chip) is not used: a built-in target has this name",
    )


def test_a_name_that_two_packages_offer_is_refused(package: Package) -> None:
    package(passes={"halve": "their_package:Halve"})
    package("another", "another", SOURCE, passes={"halve": "another:Halve"})
    with pytest.raises(UsageError, match=r"'halve' is offered by another 1.2 .* and their-package 1.2 .*; uninstall"):
        build_pass(Step(name="halve"))
    assert "halve" not in known().passes
    assert "is offered by" in known().broken[0]


def test_passes_schema_and_doctor_name_the_package(package: Package, capsys: pytest.CaptureFixture[str]) -> None:
    package(passes={"halve": "their_package:Halve", "x": "their_package:X"}, runtimes={"chip": "their_package:chip"})
    inspect_commands.passes()
    output = capsys.readouterr()
    assert "halve (lossy): Multiplies all weights by `by`.\n    from their-package 1.2" in output.out
    assert output.err.startswith("mpcompile: pass 'x' of their-package 1.2 (their_package:X) does not load: ")
    assert output.err.count("\n") == 1
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


def test_a_runtime_that_raises_does_not_stop_the_doctor(package: Package) -> None:
    source = SOURCE + "\n\ndef fail(self):\n    raise OSError('card on fire')\n\n\nChip.missing = fail\n"
    package(source=source, runtimes={"chip": "their_package:chip"})
    row = next(row for row in examine() if row.what == "target chip")
    assert not row.works
    assert "OSError: card on fire" in row.found


def test_a_command_line_run_with_model_pass_and_runtime_of_a_package(package: Package, tmp_path: Path) -> None:
    package(passes={"halve": "their_package:Halve"}, runtimes={"chip": "their_package:chip"})
    (tmp_path / "r.yaml").write_text("{passes: [nm-mask, halve], target: chip, bench: {batches: [1], seconds: 0.05}}")
    words = ["their_package:net", "--config", "r.yaml", "-o", "out", "--input-size", "1x8x8", "--mean", "0.5"]
    done = run_command(*words, "--std", "0.5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    artifact = Artifact.open(tmp_path / "out")
    assert artifact.report.environment["pass halve"] == "their-package 1.2 (their_package:Halve)"
    assert artifact.report.environment["target chip"] == "their-package 1.2 (their_package:chip)"
    assert "their-package 1.2" in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(
        UsageError, match=r"the report names the function their_package:net.*load with allow_factory=True"
    ):
        artifact.load("torch")
    assert type(artifact.load("torch", allow_factory=True)) is TinyMLP
    with pytest.raises(
        UsageError, match="target chip runs the graph in memory, not a file; compile with --target chip"
    ):
        bench(tmp_path / "out", Settings(seconds=0.05))


def test_a_pass_of_a_package_shares_its_work_if_it_says_so(package: Package) -> None:
    class Net(TinyMLP):
        pretrained_cfg = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,)}  # noqa: RUF012

    package(passes={"halve": "their_package:Halve", "train": "their_package:Train"})
    halve, train = (build_pass(Step(name=name)) for name in ("halve", "train"))
    assert not shares_work(halve)
    assert shares_work(train)
    follow(Net(), Recipe.checked({"passes": ["halve", "train"]}))  # alone, a follower is the only rank
    assert sys.modules["their_package"].Train.runs == [1]
