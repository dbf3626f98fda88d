"""Permute on small variants of timm architectures: the function stays the same, and the pattern keeps more."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch

from mpcompile.analysis.eligibility import eligible_patterns
from mpcompile.data.images import Data
from mpcompile.frontend.capture import capture
from mpcompile.frontend.preprocessing import source_of
from mpcompile.ir.model import Model
from mpcompile.ir.parity import relative_difference
from mpcompile.ir.pattern import NM
from mpcompile.ir.weight_groups import grouped
from mpcompile.passes import Permute
from mpcompile.passes.permute.coupling import apply_order, couple
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.testing import _seeded, tiny_vit

# One architecture for each kind of coupling: heads, LayerScale, two class tokens, windows and merged patches,
# channels-last, GRN, strided shortcuts, pooled shortcuts, squeeze-and-excite on depthwise, grouped, mixed tokens,
# positions inside attention, concatenation, and windows between convolutions. Each with few and narrow layers.
SIDE = 64
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"depth": 2, "img_size": SIDE, "embed_dim": 96},
    "vit_small_patch14_dinov2": {"depth": 2, "img_size": 56, "num_classes": 10, "embed_dim": 96, "num_heads": 3},
    "deit_tiny_distilled_patch16_224": {"depth": 2, "img_size": SIDE, "embed_dim": 96},
    "swin_tiny_patch4_window7_224": {"depths": (2, 2), "num_heads": (3, 6), "embed_dim": 48, "img_size": 112},
    "convnext_atto": {"depths": (1, 1, 2, 1), "dims": (16, 32, 48, 64)},
    "convnextv2_atto": {"depths": (1, 1, 2, 1), "dims": (16, 32, 48, 64)},
    "resnet18": {"channels": (16, 32, 48, 64)},
    "resnet50d": {"layers": (1, 1, 1, 1), "channels": (16, 24, 32, 48)},
    "mobilenetv3_small_050": {},
    "efficientnet_b0": {},
    "regnety_002": {"w0": 16, "wa": 16.0, "wm": 1.7, "depth": 6},
    "mixer_s32_224": {"img_size": 96, "mlp_ratio": (0.0625, 0.125)},
    "beit_base_patch16_224": {"depth": 2, "embed_dim": 96, "num_heads": 4, "img_size": SIDE},
    "densenet121": {"block_config": (2, 2, 2, 2), "growth_rate": 16},
    "maxvit_nano_rw_256": {
        "img_size": SIDE, "embed_dim": (16, 32), "stem_width": (16, 16), "depths": (1, 1), "transformer_dim_head": 16,
    },
}  # fmt: skip
LARGE = ("efficientnet_b0",)  # slow: cannot be made narrow; mobilenetv3 has the same kinds of layers


def kept_share(model: Model, pattern: NM) -> float:
    """The share of Σ|W| that the pattern keeps, over all layers that can be masked."""
    total = kept = 0.0
    for name, choice in eligible_patterns(model, pattern).items():
        if isinstance(choice, NM):
            groups = grouped(model.layer(name).weight.detach().abs(), pattern.of)
            kept += float(groups.topk(pattern.keep, dim=-1).values.sum())
            total += float(groups.sum())
    return kept / total


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in ARCHITECTURES],
)
def architecture(request: pytest.FixtureRequest) -> Model:
    """A model in float64; every parameter and statistic is random, so that no error hides behind a 0 or a 1."""
    arguments = ARCHITECTURES[request.param]
    module = _seeded(timm.create_model(request.param, **arguments), 0).double()
    source = source_of(module, name=request.param, arch=request.param, sha256="", arch_args=arguments)
    return capture(module, source if "img_size" in arguments else replace(source, size=(3, SIDE, SIDE)))


def test_the_outputs_stay_and_the_pattern_keeps_more(architecture: Model) -> None:
    before = architecture(architecture.example)
    result, _ = PassManager([Permute(sweeps=1)]).run(architecture, Data())
    after = result(result.example)
    # float64 sums are taken in another order, in some hundred operations.
    assert relative_difference(before.numpy(), after.numpy()) < 1e-9
    assert [n.target for n in result.graph.graph.nodes] == [n.target for n in architecture.graph.graph.nodes]
    assert kept_share(result, NM(2, 4)) > kept_share(architecture, NM(2, 4))
    moved = [name for name, plan in result.plan.items() if plan.permutation is not None]
    assert moved
    for name in moved:
        order = result.plan[name].permutation
        assert order is not None
        assert not torch.equal(order, torch.arange(len(order)))
        size = architecture.layer(name).weight.shape[1]
        assert all(torch.equal(part.sort().values, torch.arange(size)) for part in order.split(size))
    for name, plan in result.plan.items():
        masked = isinstance(eligible_patterns(architecture, None)[name], NM)
        assert not masked or (plan.permutation is None) == (plan.unpermuted is not None), name


def test_any_order_of_every_exchangeable_set_keeps_the_outputs(architecture: Model) -> None:
    model, _ = PassManager([]).run(architecture, Data())
    before = model(model.example)
    rng = np.random.default_rng(0)
    for group in couple(model).groups:
        for channels in group.sets:
            apply_order(model, channels, rng.permutation(channels.size))
    assert relative_difference(before.numpy(), model(model.example).numpy()) < 1e-9


def test_a_shuffled_model_keeps_about_as_much_as_the_original() -> None:
    def kept_after_permute(model: Model) -> float:
        return kept_share(PassManager([Permute(sweeps=8)]).run(model, Data())[0], NM(2, 4))

    original = kept_after_permute(tiny_vit())
    for seed in range(3):
        model, rng = tiny_vit(), np.random.default_rng(seed)
        for group in couple(model).groups:
            for channels in group.sets:
                apply_order(model, channels, rng.permutation(channels.size))
        # Different starts end in different local optima: at most 0.08 % apart with 120 seeds. The search gains 1.9 %.
        assert kept_after_permute(model) == pytest.approx(original, rel=2e-3)
