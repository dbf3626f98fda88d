"""Recipes: how their YAML is read, which errors a wrong recipe raises, and how options override it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpcompile.driver.run_plan import build_pass, known, plan_of, recipe_schema
from mpcompile.errors import RuntimeMissing, UsageError
from mpcompile.ir.pattern import NM
from mpcompile.ir.pattern_choice import parse_choice
from mpcompile.passes import PASSES, MPBudget, NMMask, Permute
from mpcompile.recipe.overrides import overridden
from mpcompile.recipe.schema import Recipe, Step, read_recipe
from mpcompile.runtimes import OnnxRuntime

FULL = """
schema_version: 1
passes:
  - nm-mask: {pattern: 8:16x2, exclude: [blocks.0.*]}
target: ort
precision: fp16
batch: 8
data: {calibration: 64, seed: 3}
gates: {max_drop: 1.5}
"""


def test_a_recipe_reads_as_written() -> None:
    recipe = Recipe.from_yaml(FULL)
    [step] = plan_of(recipe).passes
    assert step == NMMask(pattern=NM(8, 16, rows=2), exclude=("blocks.0.*",))
    assert (recipe.precision, recipe.batch, recipe.data.seed, recipe.gates.max_drop) == ("fp16", 8, 3, 1.5)


def test_unquoted_patterns_are_not_base_60() -> None:
    """YAML 1.1 reads a bare 2:4 as 2 × 60 + 4."""
    [step] = Recipe.from_yaml("passes: [{nm-mask: {pattern: 2:4}}]").passes
    assert step.params == {"pattern": "2:4"}


def test_a_pass_may_be_a_bare_name() -> None:
    assert plan_of(Recipe.from_yaml("passes: [nm-mask]")).passes == (NMMask(),)


@given(
    keep=st.integers(1, 5),
    batch=st.none() | st.integers(1, 64),
    seconds=st.floats(0.1, 100),
    drop=st.none() | st.floats(0, 50),
    globs=st.lists(st.text("ab.*1", min_size=1), max_size=3),
)
def test_yaml_round_trip_keeps_the_recipe(
    keep: int, batch: int | None, seconds: float, drop: float | None, globs: list[str]
) -> None:
    recipe = Recipe.checked(
        {
            "passes": [{"nm-mask": {"pattern": f"{keep}:6", "exclude": globs}}],
            "batch": batch,
            "bench": {"seconds": seconds},
            "gates": {"max_drop": drop},
        }
    )
    again = Recipe.from_yaml(recipe.to_yaml())
    assert again == recipe
    assert again.sha256 == recipe.sha256


def test_different_recipes_have_different_hashes() -> None:
    assert Recipe().sha256 != Recipe(opset=19).sha256


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("passes: [", "is not YAML"),
        ("- nm-mask", "holds list; a recipe is a mapping"),
        ("", "holds NoneType"),
        ("pases: []", "pases: Extra inputs are not permitted"),
        ("precision: int7", "precision: .*'fp32', 'fp16', 'bf16', 'int8' or 'fp8'.*found 'int7'"),
        ("batch: many", "batch: .*found 'many'"),
        ("batch: 0", "batch: .*greater than or equal to 1"),
        ("opset: 9", "opset: .*greater than or equal to 18"),
        ("data: {calibration: 0}", "data.calibration: "),
        ("schema_version: 2", "schema_version: "),
        ("data: {seed: -1}", "data.seed: "),
        ("gates: {max_drop: .inf}", "gates.max_drop: "),
        ("target: ort\ntarget: eager", "the key 'target' appears twice"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(text: str, error: str) -> None:
    with pytest.raises(UsageError, match=error) as found:
        Recipe.from_yaml(text)
    assert found.value.exit_code == 2
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("step", "error"),
    [
        (
            Step(name="nm-musk"),
            "pass 'nm-musk' is unknown; the passes are mp-budget, drop-unread-tokens, permute, nm-mask, tome, "
            "batch-norm, restore, distill, polish, confidence, scale-migration, quantize, certify",
        ),
        (
            Step(name="nm-mask", params={"patern": "2:4"}),
            "pass nm-mask has no 'patern'; it has pattern, criterion, refit",
        ),
        (Step(name="nm-mask", params={"pattern": "4:2"}), "pass nm-mask: pattern: pattern 4:2: needs 1 ≤ N < M"),
        (Step(name="nm-mask", params={"criterion": "luck"}), "pass nm-mask: criterion: .*'magnitude'.*found 'luck'"),
        (Step(name="nm-mask", params={"exclude": 3}), "pass nm-mask: exclude: "),
    ],
)
def test_mistakes_in_a_pass(step: Step, error: str) -> None:
    with pytest.raises(UsageError, match=error):
        build_pass(step)


def test_targets_are_checked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="target 'trrt' is unknown; the targets are eager, ort"):
        plan_of(Recipe.from_yaml("{passes: [nm-mask], target: trrt}"))
    with pytest.raises(UsageError, match="the recipe has no passes; give --pattern"):
        plan_of(Recipe())
    with pytest.raises(UsageError, match="target eager: it runs the float32 graph and not the file"):
        plan_of(Recipe.from_yaml("{passes: [nm-mask], target: eager, precision: fp16}"))
    with pytest.raises(UsageError, match="target eager: it runs on the threads of the process; leave --threads out"):
        plan_of(Recipe.from_yaml("{passes: [nm-mask], target: eager, bench: {threads: 1}}"))
    monkeypatch.setattr(OnnxRuntime, "missing", lambda self: "pip install onnxruntime")
    with pytest.raises(RuntimeMissing, match="target ort: pip install onnxruntime") as error:
        plan_of(Recipe.from_yaml("passes: [nm-mask]"))
    assert error.value.exit_code == 7


def flags(recipe: Recipe, mask: dict[str, Any] | None = None, **budget: Any) -> Recipe:
    top: dict[str, Any] = {"opset": None}
    return overridden(recipe, budget=budget, permute={}, mask=mask or {}, top=top, nested={"data": {"seed": None}})


def test_flags_win_over_the_recipe() -> None:
    recipe = Recipe.from_yaml(FULL)
    assert flags(recipe) == recipe
    [step] = flags(recipe, patterns=("1:4",)).passes
    assert step.params == {"pattern": "1:4", "exclude": ["blocks.0.*"]}
    changed = overridden(recipe, budget={}, permute={}, mask={}, top={"batch": "dynamic"}, nested={"data": {"seed": 9}})
    assert (changed.batch, changed.data.seed, changed.data.calibration) == (None, 9, 64)
    both = Recipe.from_yaml("passes: [{mp-budget: {macs: 0.7}}, nm-mask]")
    assert plan_of(flags(both, patterns=("1:4", "2:4"), macs=0.6, exclude=["a"])).passes == (
        MPBudget(patterns=(NM(1, 4), NM(2, 4)), macs=0.6, exclude=("a",)),
        NMMask(),
    )


def test_a_pattern_of_the_command_line_is_not_parsed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An NM stays an NM from the options to the passes; the text and the hash of the recipe are those of "2:4"."""
    recipe = flags(Recipe(), patterns=(NM(2, 4), NM(8, 16, rows=2)), macs=0.6)
    spelled = flags(Recipe(), patterns=("2:4", "8:16x2"), macs=0.6)
    assert (recipe.to_yaml(), recipe.sha256) == (spelled.to_yaml(), spelled.sha256)
    mask_only = flags(Recipe.from_yaml("passes: [nm-mask]"), patterns=(NM(1, 4),))
    expected = plan_of(spelled).passes
    monkeypatch.setattr(NM, "parse", None)
    assert plan_of(recipe).passes == expected
    assert plan_of(mask_only).passes == (NMMask(NM(1, 4)),)
    assert plan_of(mask_only.model_copy()).recipe.model_dump()["passes"][0] == {"nm-mask": {"pattern": "1:4"}}


def test_a_pattern_alone_adds_budget_permutation_and_mask() -> None:
    assert plan_of(flags(Recipe(), patterns=("2:4",))).passes == (MPBudget(), Permute(), NMMask())
    without = overridden(Recipe(), budget={"patterns": ("2:4",)}, permute=None, mask={}, top={}, nested={})
    assert plan_of(without).passes == (MPBudget(), NMMask())
    with pytest.raises(UsageError, match="--strict needs the permutation; add permute"):
        overridden(
            Recipe.from_yaml("passes: [nm-mask]"), budget={}, permute={"strict": True}, mask={}, top={}, nested={}
        )
    with pytest.raises(UsageError, match="--exclude needs a pattern; give --pattern too"):
        flags(Recipe(), exclude=["head"])
    with pytest.raises(UsageError, match="--budget needs a pattern; give --pattern too"):
        flags(Recipe(), signal="owl")


def test_a_budget_is_not_added_to_a_recipe_that_has_a_mask_alone() -> None:
    recipe = Recipe.from_yaml("passes: [nm-mask]")
    with pytest.raises(UsageError, match="--macs needs the budget pass; add mp-budget to the recipe's passes"):
        flags(recipe, macs=0.5)
    with pytest.raises(UsageError, match="--budget needs the budget pass"):
        flags(recipe, signal="owl")
    with pytest.raises(UsageError, match="more than one --pattern needs the budget pass"):
        flags(recipe, patterns=("2:4", "1:4"))


def test_an_unreadable_recipe_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"recipe .*nowhere.yaml cannot be read"):
        read_recipe(tmp_path / "nowhere.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read"):
        read_recipe(tmp_path / "binary.yaml")


def test_the_schema_knows_every_pass_and_refuses_other_keys() -> None:
    schema = recipe_schema(known())
    json.dumps(schema)
    assert schema["additionalProperties"] is False
    [names, budget, _, _, mask, *_] = schema["properties"]["passes"]["items"]["oneOf"]
    assert names == {"enum": list(PASSES)}
    text = mask["properties"]["nm-mask"]["properties"]["pattern"]["anyOf"][0]["pattern"]
    right = ("2:4", "2:4x4", "4:8v8", "50%", "37.5%", "50%x4", "16:32|8:16|4:8|2:4")
    assert all(re.search(text, pattern) and parse_choice(pattern) for pattern in right)
    assert not any(re.search(text, wrong) for wrong in ("2/4", "50", "2:4v", "x4", "4:8|", "%", "2:4x4v8"))
    assert budget["properties"]["mp-budget"]["properties"]["signal"]["enum"][0] == "mp"
    assert mask["properties"]["nm-mask"]["additionalProperties"] is False


def merged_with(passes: list[object], **flags: dict[str, object]) -> list[Step]:
    recipe = Recipe.checked({"passes": passes})
    return list(overridden(recipe, budget={}, permute={}, mask={}, top={}, nested={}, **flags).passes)  # type: ignore[arg-type]


def test_flags_put_passes_into_a_recipe_or_override_those_there() -> None:
    assert [s.name for s in merged_with(["nm-mask", "certify"], distill={"epochs": 3})] == [
        "nm-mask",
        "distill",
        "certify",
    ]
    steps = merged_with(["nm-mask", "distill", "confidence", "certify"], polish={"minutes": 3.0})
    assert [step.name for step in steps] == ["nm-mask", "distill", "polish", "confidence", "certify"]
    assert steps[2].params == {"minutes": 3.0}
    [_, train] = merged_with(["nm-mask", {"distill": {"epochs": 1, "batch": 8}}], distill={"epochs": 3})
    assert train.params == {"epochs": 3, "batch": 8}
    assert [s.name for s in merged_with(["distill", "certify"], tome={"r": "8"})] == ["tome", "distill", "certify"]
    steps = merged_with(["nm-mask", "batch-norm", "certify"], restore={"max_drop": 1.0}, tome={"r": "8"})
    assert [step.name for step in steps] == ["nm-mask", "tome", "batch-norm", "certify"]
    [_, restored] = merged_with(["nm-mask", {"restore": {"max_drop": 2.0}}], restore={"max_drop": 1.0})
    assert restored.params == {"max_drop": 1.0}


def test_a_number_of_merges_replaces_auto() -> None:
    [step] = merged_with([{"tome": {"r": "auto", "macs": 0.5}}], tome={"r": "8"})
    assert step.params == {"r": "8"}
    [step] = merged_with([{"tome": {"r": 8}}], tome={"r": "auto", "macs": 0.5})
    assert step.params == {"r": "auto", "macs": 0.5}


def test_null_as_a_key_is_the_parameter_of_that_name() -> None:
    for text in ("null: false", "'null': false"):
        recipe = Recipe.from_yaml(f"passes: [mp-budget: {{{text}}}]")
        assert recipe.passes[0].params == {"null": False}
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_exact_passes_come_behind_the_budget_unless_the_recipe_names_its_passes() -> None:
    def names(recipe: Recipe, top: dict[str, Any], **budget: Any) -> list[str]:
        exact: dict[str, dict[str, Any]] = {"drop-unread-tokens": {}}
        merged = overridden(recipe, budget=budget, permute={}, mask={}, exact=exact, top=top, nested={})
        return [step.name for step in merged.passes]

    assert names(Recipe(), {}, patterns=("2:4",)) == ["mp-budget", "drop-unread-tokens", "permute", "nm-mask"]
    assert names(Recipe(), {"precision": "int8"}) == ["drop-unread-tokens", "scale-migration", "quantize"]
    assert names(Recipe(), {}) == []
    assert names(Recipe.checked({"passes": ["nm-mask"]}), {}, patterns=("2:4",)) == ["nm-mask"]
