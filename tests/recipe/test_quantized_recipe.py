"""`--precision int8` on the command line: the passes that it inserts, and what the target adds to the recipe."""

from typing import Any

import pytest

from mpcompile.driver.run_plan import plan_of
from mpcompile.errors import UsageError
from mpcompile.recipe.overrides import overridden
from mpcompile.recipe.schema import Recipe
from mpcompile.runtimes import RUNTIMES
from mpcompile.runtimes.nvidia import Gpu
from mpcompile.runtimes.ort.int8 import saturates

EVIDENCE: dict[str, dict[str, Any]] = {"batch-norm": {}, "confidence": {}, "certify": {}}


def merged(passes: list[Any], precision: str | None = "int8", **more: Any) -> Recipe:
    """The recipe with these passes and the options of a run with images."""
    options: dict[str, Any] = {"budget": {}, "permute": {}, "mask": {}, "evidence": EVIDENCE, "nested": {}, **more}
    return overridden(Recipe.checked({"passes": passes}), top={"precision": precision}, **options)


def names(recipe: Recipe) -> list[str]:
    return [step.name for step in recipe.passes]


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_the_passes_are_inserted_around_all_that_change_floats(precision: str) -> None:
    options = {"tome": {"r": "8"}, "restore": {"max_drop": 1.0}, "distill": {"epochs": 1}, "polish": {"minutes": 1}}
    whole = merged([], precision, budget={"patterns": ("2:4",)}, **options)
    assert names(whole) == [
        "mp-budget",
        "scale-migration",
        "permute",
        "nm-mask",
        "tome",
        "batch-norm",
        "restore",
        "distill",
        "polish",
        "confidence",
        "quantize",
        "certify",
    ]
    limit = whole.step("quantize")
    assert limit is not None
    assert limit.params == {"max_drop": 1.0}
    assert names(merged(["certify", "nm-mask", "batch-norm"], precision)) == [
        "certify",
        "scale-migration",
        "nm-mask",
        "batch-norm",
        "quantize",
    ]
    assert names(merged(["nm-mask", "quantize", "certify"], precision)) == ["nm-mask", "quantize", "certify"]


def test_without_a_pattern_the_recipe_has_8_bit_passes_and_certify_alone() -> None:
    assert names(merged([])) == ["scale-migration", "quantize", "certify"]
    limited = merged([], restore={"max_drop": 1.0})
    assert names(limited) == ["scale-migration", "quantize", "certify"]
    assert limited.passes[1].params == {"max_drop": 1.0}
    assert names(merged([], evidence={})) == ["scale-migration", "quantize"]
    assert names(merged([], "fp32", budget={"patterns": ("2:4",)}))[-2:] == ["confidence", "certify"]
    assert names(merged(["nm-mask"], None)) == ["nm-mask"]


def test_without_confidence_no_recipe_has_the_pass() -> None:
    given = {"budget": {"patterns": ("2:4",)}}
    assert "confidence" in names(merged([], "fp32", **given))
    assert "confidence" not in names(merged([], "fp32", **given, confidence=False))
    assert names(merged(["nm-mask", "confidence"], None, confidence=False)) == ["nm-mask"]


@pytest.mark.parametrize("late", ["nm-mask", "tome", "batch-norm", "restore", "distill"])
def test_no_pass_that_changes_the_model_follows_confidence(late: str) -> None:
    with pytest.raises(UsageError, match=f"{late} comes after confidence, whose factor on the logits would not fit"):
        plan_of(Recipe.checked({"passes": ["confidence", late]}))
    assert plan_of(Recipe.checked({"passes": [late, "confidence", "certify"]})).passes


def test_the_choice_of_layers_goes_to_masks_and_to_quantize() -> None:
    chosen: dict[str, Any] = {"include": ["stem"], "exclude": ["a.*"]}
    both = merged([], budget={"patterns": ("2:4",), **chosen}, quantize=chosen)
    for name in ("mp-budget", "scale-migration", "quantize"):
        step = both.step(name)
        assert step is not None
        assert {key: step.params[key] for key in chosen} == chosen
    alone = merged([], budget=chosen, quantize=chosen)
    assert [step.params for step in alone.passes] == [chosen, chosen, {}]
    with pytest.raises(UsageError, match="--include, --exclude needs a pattern"):
        merged([], "fp32", budget=chosen, quantize=chosen)
    floats = merged([], "fp32", budget={"patterns": ("2:4",), **chosen}, quantize=chosen)
    assert floats.step("quantize") is None


@pytest.mark.parametrize(
    ("target", "precision", "params"),
    [
        ("ort", "int8", {"activations": "u8", "outputs": "convolutions", "lanes": "blocks" if saturates() else "none"}),
        ("trt", "int8", {"activations": "s8", "outputs": "all"}),
        ("trt", "fp8", {"activations": "fp8", "outputs": "all"}),
    ],
)
def test_the_target_decides_what_the_recipe_leaves_open(target: str, precision: str, params: dict[str, str]) -> None:
    text = f"{{passes: [scale-migration, quantize], target: {target}, precision: {precision}}}"
    migration, step = plan_of(Recipe.from_yaml(text)).recipe.passes
    assert step.params == params
    assert migration.params == {"activations": params["activations"]}
    given = f"{{passes: [quantize: {{outputs: all, observer: min-max}}], target: {target}, precision: {precision}}}"
    plan = plan_of(Recipe.from_yaml(given))
    assert plan.recipe.passes[0].params == {**params, "outputs": "all", "observer": "min-max"}
    assert Recipe.from_yaml(plan.recipe.to_yaml()).sha256 == plan.recipe.sha256
    assert plan_of(plan.recipe).recipe == plan.recipe


@pytest.mark.parametrize(
    ("target", "precision", "text"),
    [
        ("ort", "fp8", "target ort: it has no FP8 kernels on a CPU; use int8"),
        ("eager", "int8", "target eager: it runs the float32 graph and not the file, so int8 would not be measured"),
    ],
)
def test_a_target_that_cannot_is_refused(target: str, precision: str, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        plan_of(Recipe.from_yaml(f"{{passes: [quantize], target: {target}, precision: {precision}}}"))


def test_fp8_is_refused_on_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpcompile.runtimes.tensorrt.target.first_gpu", lambda: Gpu("NVIDIA A100", (8, 0)))
    with pytest.raises(UsageError, match="fp8 needs compute capability 8.9 or newer, and NVIDIA A100 has 8.0"):
        plan_of(Recipe.from_yaml("{passes: [quantize], target: trt, precision: fp8}"))
    monkeypatch.setattr("mpcompile.runtimes.tensorrt.target.first_gpu", lambda: Gpu("NVIDIA L40", (8, 9)))
    assert RUNTIMES["trt"].refuses("fp8", None) is None
    assert "no 8-bit kernels" in str(RUNTIMES["ort-cuda"].refuses("int8", None))
    for precision in ("int8", "fp8"):
        assert RUNTIMES["rtx"].refuses(precision, None) is None


@pytest.mark.parametrize("name", ["nm-mask", "tome", "batch-norm", "restore", "distill", "permute"])
def test_no_pass_after_quantize_may_change_the_model(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} comes after quantize and would change weights that are in 8 bits"):
        plan_of(Recipe.checked({"passes": ["quantize", name], "precision": "int8"}))
    with pytest.raises(UsageError, match="the recipe quantises twice"):
        plan_of(Recipe.checked({"passes": ["quantize", "quantize"], "precision": "int8"}))
