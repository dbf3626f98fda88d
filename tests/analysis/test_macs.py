"""Multiply-accumulates and bytes, compared with closed forms of known networks and with PyTorch's FLOP counter."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mpcompile.analysis.macs import Cost, cost
from mpcompile.frontend.capture import capture
from mpcompile.frontend.preprocessing import source_of
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.testing import TinyMLP, tiny_cnn, tiny_source, tiny_vit


def captured(arch: str) -> Model:
    module = timm.create_model(arch)
    return capture(module, source_of(module, name=arch, arch=arch, sha256=""))


@pytest.fixture(scope="module")
def vit_base() -> Cost:
    return cost(captured("vit_base_patch16_224"))


def test_vit_base_equals_its_closed_form(vit_base: Cost) -> None:
    """12 D² n for the Linears and 2 n² D for attention of each block, patches, head: 17.5638 G (D = 768, n = 197)."""
    found = vit_base
    d, n = 768, 197
    blocks = 12 * (12 * d * d * n + 2 * n * n * d)
    assert found.macs == blocks + 196 * 768 * d + 1000 * d
    assert round(found.macs / 1e9, 4) == 17.5638
    assert found.layers["blocks.3.attn.qkv"] == 3 * d * d * n
    assert found.weight_bytes({}) == 4 * 86_567_656


def test_resnet50_equals_the_published_count() -> None:
    found = cost(captured("resnet50"))
    assert round(found.macs / 1e9, 3) == 4.089
    assert sum(found.layers.values()) == found.macs


def test_half_of_all_block_linears_saves_the_published_share(vit_base: Cost) -> None:
    """By arXiv 2606.02608, 2:4 on every Linear of the blocks leaves 52.37 % of ViT-B's MACs."""
    found = vit_base
    patterns = {name: NM(6, 12) for name in found.layers if name.startswith("blocks.")}
    assert 1 - found.executed_macs(patterns) / found.macs == pytest.approx(0.4763, abs=5e-5)


@pytest.mark.parametrize("build", [tiny_vit, tiny_cnn])
def test_total_equals_the_counter_on_the_whole_model(build: object) -> None:
    model = build()  # type: ignore[operator]
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model.graph(model.example)
    found = cost(model)
    missing = counted.get_total_flops() / 2 / len(model.example)
    # On a CPU the counter does not count fused attention: 2 blocks of 2 n² D, n = 17 and D = 32.
    assert found.macs - missing == pytest.approx(2 * 2 * 17 * 17 * 32 if build is tiny_vit else 0)


class Fetched(nn.Module):
    """A functional call with a layer's weight, and a weight that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice = nn.Linear(64, 16), nn.Linear(16, 16)
        self.tied = nn.Linear(16, 16)
        self.tied.weight = self.twice.weight

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x.flatten(1), self.stem.weight, self.stem.bias)
        return self.tied(self.twice(self.twice(y).relu()).relu())  # type: ignore[no-any-return]


def test_functional_and_tied_layers_are_counted() -> None:
    found = cost(capture(Fetched(), tiny_source()))
    assert found.layers == {"stem": 64 * 16, "twice": 2 * 256, "tied": 256}
    assert found.macs == 64 * 16 + 3 * 256
    assert found.weights == {"stem": 1024, "twice": 256, "tied": 0}
    assert found.other_parameters == 16 * 3


def test_packed_bytes() -> None:
    found = cost(capture(TinyMLP(), tiny_source()))
    dense = 4 * (64 * 32 + 32 * 32 + 32 * 10 + 32 + 32 + 10)
    assert found.weight_bytes({}) == dense
    # Half the values, and 2 bits for the index of each in its group; in half precision likewise.
    assert found.weight_bytes({"hidden": NM(2, 4)}) == dense - 4 * 1024 + 512 * 4 + 512 * 2 / 8
    assert found.weight_bytes({"hidden": NM(2, 4)}, 2) == dense / 2 - 2 * 1024 + 512 * 2 + 512 * 2 / 8
    assert found.weight_bytes({"hidden": NM(2, 4, rows=4)}) == dense - 4 * 1024 + 512 * 4 + 512 * 2 / 8 / 4


def test_views_have_no_activation_bytes() -> None:
    found = {row.node: row for row in cost(capture(TinyMLP(), tiny_source())).nodes}
    assert found["flatten"].activation_bytes == 0
    assert found["stem"].activation_bytes == 32 * 4
