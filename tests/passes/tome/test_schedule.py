"""Schedules of token merging: parsing, limits, cost, and the automatic search."""

from pathlib import Path

import pytest
from tome_models import NARROW, captured, run
from torch import nn

import mpcompile
from mpcompile.analysis.block_macs import as_published, charged, merges
from mpcompile.analysis.macs import cost
from mpcompile.data.images import Data
from mpcompile.driver.compile import preview
from mpcompile.errors import PassError, UsageError
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.ir.shapes import run_example
from mpcompile.passes import NMMask, ToMe
from mpcompile.passes.tome.graph_rewrite import mergeable_attentions
from mpcompile.passes.tome.schedule import decreasing, parse_schedule
from mpcompile.passes.tome.schedule_search import costs
from mpcompile.recipe.schema import Recipe
from mpcompile.testing import tiny_cnn, tiny_data, tiny_vit


def test_schedules_are_spelt() -> None:
    assert parse_schedule(8, 3) == parse_schedule("8", 3) == parse_schedule("8:uniform", 3) == (8, 8, 8)
    assert parse_schedule("8:decreasing", 12) == decreasing(8, 12) == (16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0)
    assert decreasing(5, 1) == (5,)
    assert parse_schedule("0,0,4,8", 4) == parse_schedule((0, 0, 4, 8), 4) == (0, 0, 4, 8)


@pytest.mark.parametrize("r", ["eight", "8:steep", "-1", "1,2:decreasing", "", "4,x"])
def test_what_is_no_schedule_is_refused(r: str) -> None:
    with pytest.raises(UsageError, match="needed is a number of tokens such as 8"):
        ToMe(r=r)


def test_other_mistakes_are_refused() -> None:
    with pytest.raises(UsageError, match="r: auto needs macs"):
        ToMe(r="auto")
    with pytest.raises(UsageError, match="macs needs r: auto, but r is 8"):
        ToMe(macs=0.5)
    with pytest.raises(UsageError, match="macs must be between 0 and 1, found 1.5"):
        ToMe(r="auto", macs=1.5)
    with pytest.raises(UsageError, match="images must be at least 1, found 0"):
        ToMe(images=0)
    with pytest.raises(UsageError, match="r has 3 numbers, but the model has 2 attentions"):
        run(tiny_vit(), ToMe(r=(1, 2, 3)))
    with pytest.raises(UsageError, match="at blocks.1.attn there are 9 tokens, 1 of them protected, .* at most 4"):
        run(tiny_vit(), ToMe(r="8,5"))
    with pytest.raises(UsageError, match=r"least_left is a share of the tokens, .* found 1"):
        ToMe(least_left=1.0)
    with pytest.raises(PassError, match="this graph merges tokens already"):
        run(tiny_vit(), ToMe(r=1), ToMe(r=1))
    with pytest.raises(PassError, match="measures on calibration images, and there are none"):
        run(tiny_vit(), ToMe(r="auto", macs=0.7))
    with pytest.raises(PassError, match=r"leaves \d\d.\d% of the dense multiply-accumulates, and macs asks for 10.0%"):
        run(tiny_vit(), ToMe(r="auto", macs=0.1), data=tiny_data(tiny_vit()))


def test_a_schedule_that_leaves_too_few_tokens_is_refused() -> None:
    """`--tome 1000` was accepted, and left one token of an image."""
    model = captured("vit_tiny_patch16_224", depth=6, img_size=96, **NARROW)  # 37 tokens
    for r in (1000, "1000:decreasing"):
        with pytest.raises(UsageError, match=r"r is 1000, but of 37 tokens \(1 protected\) at most 18 can merge"):
            run(model, ToMe(r=r))
        with pytest.raises(UsageError, match="at most 18 can merge after one attention; give a smaller r"):
            ToMe(r=r).require_inputs(model, Data())
    with pytest.raises(UsageError, match=r"leaves 2 of 37 tokens \(5.4 %\), and at least 10 % have to be left"):
        run(model, ToMe(r=18, least_left=0.1))
    assert sum(merges((found := run(model, ToMe(r=18))).graph, found.example)) == 35


def test_a_schedule_is_refused_before_the_masks_are_made(tmp_path: Path) -> None:
    from timm.models.vision_transformer import VisionTransformer

    vit = VisionTransformer(img_size=8, patch_size=1, in_chans=1, num_classes=4, embed_dim=16, depth=8, num_heads=2)
    vit.pretrained_cfg = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,)}
    stages: list[str] = []
    recipe = Recipe.checked({"passes": [{"nm-mask": {"pattern": "2:4"}}, {"tome": {"r": 31}}]})
    with pytest.raises(UsageError, match=r"leaves 2 of 65 tokens \(3.1 %\), and at least 5 % have to be left"):
        mpcompile.compile(
            vit.eval(), recipe, output=tmp_path / "out", observe=lambda step: stages.append(str(step.stage))
        )
    assert stages == ["load", "capture"]
    with pytest.raises(UsageError, match="at least 5 % have to be left; merge fewer tokens, or lower least_left"):
        preview(vit.eval(), recipe)


def test_costs_are_those_of_the_merged_graph() -> None:
    """The polynomial in the tokens, fitted to three of their numbers, is exact at others."""
    model = captured("vit_tiny_patch16_224", depth=4, **NARROW)
    run_example(model)
    attentions = mergeable_attentions(model.graph.graph, dict(model.graph.named_modules()))
    patterns = {"blocks.1.mlp.fc1": NM(1, 4)}
    found = costs(model, attentions, 1, patterns)
    for schedule in ((0, 0, 0, 0), (3, 9, 0, 20), (98, 40, 3, 1)):
        merged = run(model, ToMe(r=schedule))
        assert found.of(schedule) == pytest.approx(cost(merged).executed_macs(patterns), rel=1e-9)


def test_auto_reaches_its_share_and_moves_logits_less() -> None:
    model = captured("vit_tiny_patch16_224", depth=4, img_size=48, patch_size=8, **NARROW)
    data = tiny_data(model, 24)

    def shift(result: Model) -> float:
        images = data.calibration.first(24)
        return float((result(images) - model(images)).abs().amax(1).mean())

    result = run(model, ToMe(r="auto", macs=0.7, images=24), data=data)
    dense = cost(model).macs
    assert cost(result).macs <= 0.7 * dense
    for plain in ("uniform", "decreasing"):
        same_cost = next(
            merged for r in range(1, 19) if cost(merged := run(model, ToMe(r=f"{r}:{plain}"))).macs <= 0.7 * dense
        )
        assert shift(result) <= shift(same_cost)
    # A class token is all that is read at the end: merging after the last attention costs nothing at all.
    free = run(model, ToMe(r="auto", macs=0.99, images=24), data=data)
    assert merges(free.graph, free.example) == (0, 0, 0, 18)
    assert shift(free) == 0


def test_auto_counts_masks_in() -> None:
    model = tiny_vit()
    data = tiny_data(model)
    masked = run(
        model, NMMask(pattern=NM(1, 4), criterion="magnitude", refit="none"), ToMe(r="auto", macs=0.75), data=data
    )
    assert merges(masked.graph, masked.example) == (0, 0)  # the masks alone leave less


@pytest.mark.slow  # test_recipes.py counts this recipe, masked, in less time
def test_vit_base_costs_what_the_paper_says_and_what_is_true() -> None:
    """The paper: 59.81 % and 7.06 G for ViT-B/16, r = 8, 2:4; with the MLP at its own tokens 61.10 %, 6.83 G."""
    model = captured("vit_base_patch16_224")
    result = run(model, ToMe(r=8))
    dense = cost(model).macs
    patterns = {name: NM(2, 4) for name, _ in result.layers() if name.startswith("blocks.")}
    published, true = as_published(result).executed_macs(patterns), cost(result).executed_macs(patterns)
    assert (round(100 * (1 - published / dense), 2), round(published / 1e9, 2)) == (59.81, 7.06)
    assert (round(100 * (1 - true / dense), 2), round(true / 1e9, 2)) == (61.10, 6.83)
    assert as_published(result).macs / 1e9 == pytest.approx(13.557, abs=5e-4)
    assert cost(result).merging_macs < 0.001 * dense


def test_charged_is_both_at_once() -> None:
    model = tiny_vit()
    result = run(model, NMMask(criterion="magnitude", refit="none"), ToMe(r=4))
    found = charged(model, result)
    assert found.tokens == (17, 13, 9)
    assert found.compressed < found.as_published < found.dense == cost(model).macs
    assert charged(model, model).tokens == (17, 17, 17)
    assert charged(tiny_cnn(), tiny_cnn()).tokens == ()


@pytest.mark.parametrize(
    ("arch", "pattern", "chosen", "saved"),
    [
        # test_recipes.py counts these two, masked, in less time.
        pytest.param("vit_large_patch16_224", NM(8, 16), "blocks.", 48.32, marks=pytest.mark.slow),
        pytest.param("convnextv2_base", NM(12, 16), "pointwise", 24.1, marks=pytest.mark.slow),
        ("resnet50", NM(8, 16), "convolutions", 48.5),
    ],
)
def test_other_models_cost_what_the_paper_says(arch: str, pattern: NM, chosen: str, saved: float) -> None:
    """The nominal rows of arXiv 2606.02608: no token merging, stem and head dense."""
    model = captured(arch)
    layers = {
        "blocks.": [n for n, _ in model.layers() if n.startswith("blocks.")],
        "pointwise": [n for n, m in model.layers() if isinstance(m, nn.Linear) and "head" not in n],
        "convolutions": [n for n, m in model.layers() if isinstance(m, nn.Conv2d) and n != "conv1"],
    }[chosen]
    found = cost(model)
    share = 1 - found.executed_macs(dict.fromkeys(layers, pattern)) / found.macs
    assert 100 * share == pytest.approx(saved, abs=0.05)
