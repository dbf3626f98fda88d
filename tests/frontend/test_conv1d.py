"""A Conv1d becomes a Conv2d of height 1 that computes the same, with what lies between two of them."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mpcompile.frontend.conv1d import as_two_dimensional

SETTINGS: list[dict[str, object]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 4, "stride": 2, "dilation": 2, "groups": 4, "bias": False},
    {"kernel_size": 3, "padding": "same", "padding_mode": "circular"},
    {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    {"kernel_size": 1, "padding": "valid"},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_it_computes_the_same(settings: dict[str, object]) -> None:
    module = nn.Sequential(nn.Conv1d(8, 16, **settings)).eval()  # type: ignore[arg-type]
    graph = fx.symbolic_trace(module)
    as_two_dimensional(graph)
    layer = graph.get_submodule("0")
    assert isinstance(layer, nn.Conv2d)
    assert layer.kernel_size[0] == 1
    x = torch.randn(2, 8, 12)
    assert torch.equal(graph(x), module(x))  # torch runs a Conv1d as a Conv2d of height 1
    assert torch.equal(graph(x[0]), module(x[0]))


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv1d(8, 8, 3, padding=1) for _ in range(3))
        self.c.weight = self.b.weight
        self.norm = nn.BatchNorm1d(8)
        self.read = nn.Conv1d(8, 8, 1)
        self.norm.running_mean, self.norm.running_var = torch.randn(8), torch.rand(8) + 0.5

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm(self.a(x)))
        x = x + self.b(x)
        x = self.c(self.c(x).relu())
        out: Tensor = self.read(x) + self.read.weight.sum()
        return out


def test_norms_and_activations_between_two_are_at_height_one() -> None:
    module = Chain().eval()
    graph = fx.symbolic_trace(module)
    as_two_dimensional(graph)
    graph.graph.lint()
    x = torch.randn(2, 8, 12)
    # A batch normalization of another rank may round in another order.
    assert torch.allclose(graph(x), module(x), atol=1e-6)
    names = [node.target for node in graph.graph.nodes if node.op in ("call_module", "call_method")]
    assert names == [
        "unsqueeze", "a", "norm", "squeeze", "unsqueeze", "b", "squeeze", "unsqueeze", "c", "relu", "c", "squeeze",
        "read", "sum",
    ]  # fmt: skip
    assert isinstance(graph.norm, nn.BatchNorm2d)
    assert isinstance(graph.read, nn.Conv1d)  # its weight is read besides
    assert graph.get_parameter("b.weight") is graph.get_parameter("c.weight")
    assert graph.state_dict().keys() == module.state_dict().keys()


def test_pools_between_two_are_at_height_one() -> None:
    module = nn.Sequential(
        nn.Conv1d(8, 8, 3, bias=False), nn.MaxPool1d(3, 2, 1, ceil_mode=True), nn.Conv1d(8, 8, 1),
        nn.AvgPool1d(2, padding=1, count_include_pad=False), nn.Conv1d(8, 8, 1), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
    )  # fmt: skip
    graph = fx.symbolic_trace(module.eval())
    as_two_dimensional(graph)
    x = torch.randn(2, 8, 21)
    assert torch.equal(graph(x), module(x))
    assert [node.target for node in graph.graph.nodes if node.op == "call_method"] == ["unsqueeze", "squeeze"]
    shared = fx.symbolic_trace(nn.Sequential(module[0], module[1], module[1]).eval())
    as_two_dimensional(shared)
    assert torch.equal(shared(x), module[1](module[1](module[0](x))))
