"""The outline of a captured graph: its operations in order, what they read, and the module that each is shown in."""

import pytest
import timm
import torch
from torch import Tensor, fx, nn

from mpcompile.analysis.graph_outline import LARGEST_GROUP, outline
from mpcompile.frontend.capture import capture
from mpcompile.ir.graph_node import GraphNode


class Residual(nn.Module):
    """A block whose sum is in its own forward, as blocks of models are written."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.act(self.first(x)))  # type: ignore[no-any-return]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Residual(), Residual())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x.flatten(1)))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def small() -> tuple[GraphNode, ...]:
    return outline(capture(Small().eval(), example=torch.randn(2, 2, 2, 2)).graph)


def test_operations_are_in_order_and_shown_in_their_block(small: tuple[GraphNode, ...]) -> None:
    assert [(node.kind, node.group) for node in small] == [
        ("input", "input"),
        ("flatten", "input"),
        *[(kind, f"blocks.{n}") for n in (0, 1) for kind in ("Linear", "ReLU", "Linear", "add")],
        ("Linear", "head"),
        ("output", "head"),
    ]
    assert [node.layer for node in small if node.layer] == [
        "blocks.0.first", "blocks.0.second", "blocks.1.first", "blocks.1.second", "head",
    ]  # fmt: skip


def test_an_addition_reads_both_of_its_inputs(small: tuple[GraphNode, ...]) -> None:
    first, second = [node for node in small if node.kind == "add"]
    assert sorted(small[at].name for at in first.inputs) == ["blocks.0.second", "flatten"]
    assert sorted(small[at].kind for at in second.inputs) == ["Linear", "add"]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18", "convnext_atto", "tf_efficientnet_lite0"])
def test_the_outline_of_real_models_keeps_every_layer_and_the_order(name: str) -> None:
    side = 224 if name.startswith("vit") else 64
    model = capture(timm.create_model(name).eval(), example=torch.randn(1, 3, side, side))
    found = outline(model.graph)
    assert [node.layer for node in found if node.layer] == [
        node.target for node in model.graph.graph.nodes
        if node.op == "call_module" and isinstance(model.graph.get_submodule(node.target), nn.Linear | nn.Conv2d)
    ]  # fmt: skip
    for n, node in enumerate(found):
        assert all(at < n for at in node.inputs)
        assert node.inputs or node.kind == "input"
    read = {at for node in found for at in node.inputs}
    assert read == set(range(len(found) - 1))  # every result is read but that of the output
    sizes = [sum(node.group == group for node in found) for group in {node.group for node in found}]
    assert max(sizes) <= LARGEST_GROUP


def test_what_only_reads_items_passes_its_input_on() -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            first, second = x.chunk(2, 1)
            return first * second

    found = outline(fx.symbolic_trace(Halves()))
    assert [(node.kind, node.inputs) for node in found] == [
        ("input", ()),
        ("chunk", (0,)),
        ("mul", (1,)),
        ("output", (2,)),
    ]
