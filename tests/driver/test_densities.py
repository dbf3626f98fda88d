"""`--pattern 50%`: what it stands for on each target, in recipes, commands, plans and reports."""

import itertools
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from commandline import mpcompile, refused
from torch import nn

from mpcompile.cli.parse import patterns
from mpcompile.data.images import Data
from mpcompile.driver.recipe_search import paths_of
from mpcompile.driver.run_plan import density_patterns, plan_of
from mpcompile.errors import UsageError
from mpcompile.frontend.capture import capture
from mpcompile.ir.pattern import NM
from mpcompile.passes import MPBudget, NMMask, Permute
from mpcompile.recipe.schema import Recipe, Step
from mpcompile.runtimes import OnnxRuntime, choice_at, freest, native
from mpcompile.runtimes.eager import Eager
from mpcompile.runtimes.native.equal_speed import SAME, SPEED_FP32, WIDEST_FP32
from mpcompile.testing import tiny_source

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
HALF = Fraction(1, 2)


def widths() -> nn.Module:
    """Returns layers of 32, 48, 24, 20 and 30 inputs between a stem and a head."""
    sizes = (8, 32, 48, 24, 20, 30, 10)
    return nn.Sequential(nn.Flatten(), *(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))


@pytest.mark.parametrize(
    ("target", "precision", "half", "quarter"),
    [
        ("ort", "fp32", "16:32|8:16|4:8|2:4", "8:32|4:16|2:8|1:4"),
        ("ort", "int8", "8:16|4:8|2:4", "4:16|2:8|1:4"),
        ("eager", "fp32", "16:32|8:16|4:8|2:4", "8:32|4:16|2:8|1:4"),
        ("rtx", "fp32", "16:32|8:16|4:8|2:4", "8:32|4:16|2:8|1:4"),
    ],
)
def test_a_density_stands_for_the_patterns_of_one_speed(target: str, precision: str, half: str, quarter: str) -> None:
    assert [str(p) for p in patterns("50%,25%", target, None, None, precision)] == [half, quarter]


def test_tensorrt_runs_one_density() -> None:
    assert density_patterns("trt", HALF, "fp16") == NM(2, 4)
    assert patterns("50%", "trt", None, 4) == (NM(2, 4, 4),)
    with pytest.raises(UsageError, match="trt runs 2:4 and no other pattern .*25% gains no speed .*give --pattern 50%"):
        density_patterns("trt", Fraction(1, 4), "fp16")
    with pytest.raises(UsageError, match="target eager: it runs the float32 graph"):
        density_patterns("eager", HALF, "fp16")


def test_a_density_is_the_same_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    found = density_patterns("ort", HALF, "int8")
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "missing", lambda: "not built")
    assert density_patterns("ort", HALF, "int8") == found


class OnlyTwoOfFour(Eager):
    """A runtime of another package that has a kernel and says nothing of densities."""

    def has_kernel(self, pattern: NM) -> bool:
        return pattern.plain == NM(2, 4)


def test_other_runtimes_get_the_patterns_that_they_have_kernels_for() -> None:
    assert choice_at(OnlyTwoOfFour(), HALF, "fp32") == freest(OnlyTwoOfFour(), NM(2, 4), "fp32") == NM(2, 4)
    assert str(choice_at(OnlyTwoOfFour(), Fraction(1, 4), "fp32")) == "8:32|4:16|2:8|1:4"  # all run as dense
    vocabulary, wide = NM(4, 8, vocabulary=8), NM(32, 64)
    assert freest(OnnxRuntime(), vocabulary, "fp32") == vocabulary
    assert freest(OnnxRuntime(), wide, "fp32") == wide
    assert str(freest(OnnxRuntime(), NM(1, 2), "int8")) == "8:16|4:8|2:4"


def test_densities_that_the_int8_kernel_does_not_skip_take_the_freest() -> None:
    assert str(density_patterns("ort", Fraction(3, 4), "int8")) == "24:32|12:16|6:8|3:4"


def test_the_table_of_speeds_is_what_was_measured() -> None:
    rows = json.loads((RESULTS / "cpu_groups.json").read_text(encoding="utf-8"))["rows"]
    for text, speeds in SPEED_FP32.items():
        widest = NM.parse(text)
        assert widest.of == WIDEST_FP32
        own = [row["relative_speed"] for row in rows if row["widest"] == text]
        for halvings, speed in enumerate(speeds, 1):
            narrower = str(NM(widest.keep >> halvings, widest.of >> halvings))
            measured = float(np.median([row[narrower][0] for row in own]))
            assert speed == round(measured, 2)
            assert abs(1 - measured) <= SAME
    assert {row["widest"] for row in rows} == set(SPEED_FP32)


@pytest.mark.parametrize("named", [False, True])
def test_each_layer_gets_the_freest_pattern_of_its_width(named: bool) -> None:
    torch.manual_seed(0)
    model = capture(widths(), tiny_source(size=(8, 1, 1)), torch.randn(2, 8, 1, 1))
    [half] = patterns("50%", "ort", None)
    if named:
        model = MPBudget((half,), null=False)(model, Data())
    masked = NMMask(None if named else half)(model, Data())
    names = [name for name, _ in masked.layers()]
    found = {name: masked.plan_of(name) for name in names}
    assert [str(found[name].pattern) for name in names[1:4]] == ["16:32", "8:16", "4:8"]
    assert str(found[names[4]].pattern) == "2:4"
    assert "output layer" in str(found[names[5]].skipped)
    again = NMMask(half)(masked, Data())
    assert {name: again.plan_of(name).pattern for name in names} == {name: found[name].pattern for name in names}


def test_a_layer_whose_width_no_m_divides_stays_dense() -> None:
    model = capture(nn.Sequential(nn.Flatten(), *(nn.Linear(a, b) for a, b in ((8, 30), (30, 32), (32, 32), (32, 4)))),
                    tiny_source(size=(8, 1, 1)), torch.randn(2, 8, 1, 1))  # fmt: skip
    [half] = patterns("50%", "ort", None)
    masked = NMMask(half)(Permute(half)(model, Data()), Data())
    reasons = [masked.plan_of(name).skipped for name, _ in masked.layers()]
    assert reasons[1:3] == ["30 input channels are not a multiple of 32 or 16 or 8 or 4", None]


def test_a_recipe_with_a_density_records_the_patterns_of_its_target() -> None:
    steps = (
        Step(name="mp-budget", params={"patterns": ["50%", "1:4"]}),
        Step(name="nm-mask", params={"pattern": "25%"}),
    )
    recipe = Recipe(passes=steps)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    plan = plan_of(recipe)
    assert plan.recipe.passes[0].params["patterns"] == ["16:32|8:16|4:8|2:4", "1:4"]
    assert plan.recipe.passes[1].params["pattern"] == "8:32|4:16|2:8|1:4"
    assert plan_of(plan.recipe).passes == plan.passes
    with pytest.raises(UsageError, match="target trt runs 2:4"):
        plan_of(recipe.model_copy(update={"target": "trt"}))


def test_the_command_tells_the_pattern_of_each_layer(example: Path, tmp_path: Path) -> None:
    words = ("--pattern", "50%", "--dry-run", "--json", "--output", tmp_path / "out")
    done = mpcompile(example / "model.safetensors", *words)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert {row["pattern"] for row in told["layers"]} == {None, "16:32"}
    assert told["recipe"]["passes"][0]["mp-budget"]["patterns"] == ["16:32|8:16|4:8|2:4"]
    done = mpcompile(example / "model.safetensors", *words, "--target", "trt", "--pattern", "25%")
    refused(done, 2, "target trt runs 2:4 and no other pattern faster than dense")


def test_analyze_plans_a_density(example: Path) -> None:
    words = ("--pattern", "50%,25%", "--macs", 0.6, "--target", "eager", "--json", "--no-null")
    done = mpcompile("analyze", example / "model.safetensors", *words)
    assert done.returncode == 0, done.stderr
    used = {row["pattern"] for row in json.loads(done.stdout)["layers"]}
    assert used - {None} <= {"16:32", "8:32"}
    assert used - {None}


def test_tune_searches_each_density() -> None:
    budget = Step(name="mp-budget", params={"patterns": ["50%", "25%"]})
    recipe = plan_of(Recipe(passes=(budget, Step(name="nm-mask")))).recipe
    names = [path.name for path in paths_of(recipe, lambda _: 0.5)]
    assert names == ["16:32|8:16|4:8|2:4, masks", "8:32|4:16|2:8|1:4, masks"]


def test_doctor_says_what_a_density_stands_for() -> None:
    done = mpcompile("doctor")
    assert "--pattern 50% is 16:32 or 8:16 or 4:8 or 2:4" in " ".join(done.stdout.split())
