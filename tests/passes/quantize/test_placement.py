"""Where quantizers go: inputs of layers, outputs that runtimes fuse, both sides of residual adds."""

import copy
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mpcompile.analysis.eligibility import weight_nodes
from mpcompile.frontend.capture import capture
from mpcompile.ir.model import Model
from mpcompile.ir.quantization import quantizers
from mpcompile.passes.quantize.placement import Outputs, insert, quantizer_nodes, quantizers_before, sites
from mpcompile.passes.quantize.policy import quantizable
from mpcompile.testing import tiny_cnn, tiny_mlp, tiny_source, tiny_vit

MODELS = [tiny_mlp, tiny_cnn, tiny_vit]
both_outputs = pytest.mark.parametrize("outputs", ["convolutions", "all"])


def layers_of(model: Model, **choice: Sequence[str]) -> list[str]:
    return [name for name, reason in quantizable(model, **choice).items() if reason is None]


def placed(net: nn.Module | Model, outputs: Outputs = "convolutions", **choice: Sequence[str]) -> Model:
    """The model with its quantizers."""
    model = net if isinstance(net, Model) else capture(net.eval(), tiny_source())
    insert(model.graph, sites(model, layers_of(model, **choice), outputs), "u8")
    model.graph.graph.lint()
    return model


def quantised_values(model: Model) -> list[str]:
    """What the quantizers read, in order: names of modules, or of operations."""
    values = [node.all_input_nodes[0] for node in quantizer_nodes(model.graph).values()]
    return [str(value.target) if value.op == "call_module" else value.name for value in values]


def readers(model: Model, value: str) -> set[str]:
    """The nodes that read the quantised form of the value with this node name."""
    return {user.name for user in quantizer_nodes(model.graph)[f"quantizers.{value}"].users}


def node_of(model: Model, layer: str) -> fx.Node:
    [node] = weight_nodes(model.graph)[0][layer]
    return node


@both_outputs
@pytest.mark.parametrize("make", MODELS)
def test_every_quantised_layer_reads_a_quantizer_and_no_other_layer_does(make: object, outputs: Outputs) -> None:
    model: Model = make()  # type: ignore[operator]
    before = model(model.example)
    placed(model, outputs)
    names = layers_of(model)
    sources = {name: node_of(model, name).all_input_nodes[0] for name, _ in model.layers()}
    at = set(quantizer_nodes(model.graph).values())
    assert all(sources[name] in at for name in names)
    assert sources["head"] not in at or outputs == "all" or make is tiny_cnn
    for name in names:
        [own] = quantizers_before(model.graph, [name])
        assert quantizer_nodes(model.graph)[own] is sources[name]
    # Quantizers without a range return their inputs.
    assert torch.equal(model(model.example), before)


class Residual(nn.Module):
    """Residual blocks of convolutions with each kind of activation function."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.norm_a, self.norm_b, self.act = nn.BatchNorm2d(8), nn.BatchNorm2d(8), act
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm_b(self.b(self.act(self.norm_a(self.a(x)))))
        return self.head((x + y).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU6(), nn.Hardtanh()])
def test_outputs_of_convolutions_are_quantised_after_norm_and_rectifier(act: nn.Module) -> None:
    model = placed(Residual(act))
    assert quantised_values(model) == ["stem", "act", "norm_b"]
    # Both sides of the residual add are 8 bits.
    assert readers(model, "stem") == {"a", "add"}
    assert readers(model, "norm_b") == {"add"}


def test_other_activation_functions_are_not_fused_with_convolutions() -> None:
    model = placed(Residual(nn.SiLU()))
    assert quantised_values(model) == ["stem", "norm_a", "act", "norm_b"]
    assert readers(model, "norm_a") == {"act"}
    model = placed(Residual(nn.SiLU()), "all")
    assert quantised_values(model) == ["stem", "act", "norm_b"]


def test_functions_are_fused_as_modules_are() -> None:
    class Functions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.hardtanh(self.a(self.stem(x)), 0, 6)
            x = self.b(x).clamp(min=0)
            return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]

    assert quantised_values(placed(Functions())) == ["stem", "hardtanh", "clamp"]


def test_a_value_with_two_readers_ends_the_fused_chain() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.head = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(self.stem(x))
            return self.head((x.relu() * x.sigmoid()).mean((2, 3)))  # type: ignore[no-any-return]

    model = placed(Branches())
    assert quantised_values(model) == ["stem", "a"]
    assert readers(model, "a") == {"relu", "sigmoid"}


def test_residual_sums_of_linear_layers_stay_in_floating_point() -> None:
    model = placed(tiny_vit())
    adds = [node for node in model.graph.graph.nodes if node.name.startswith("add")]
    at = set(quantizer_nodes(model.graph).values())
    assert adds
    assert not any(source in at for add in adds for source in add.all_input_nodes)
    assert len(at) == 8  # one for each quantised layer


def test_all_quantises_the_branch_and_leaves_the_skip_branch() -> None:
    model = placed(tiny_vit(), "all")
    at = set(quantizer_nodes(model.graph).values())
    residual = [n for n in model.graph.graph.nodes if n.name.startswith("add") and len(n.all_input_nodes) == 2][1:]
    assert len(residual) == 4
    for add in residual:
        assert sum(source in at for source in add.all_input_nodes) == 1
    # After GELU, not before it.
    gelu = [node for node in model.graph.graph.nodes if node.target == "blocks.0.mlp.act"]
    assert [node.all_input_nodes[0].target for node in gelu] == ["blocks.0.mlp.fc1"]


def test_an_input_of_two_layers_is_quantised_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.q, self.k, self.head = (nn.Linear(n, m) for n, m in ((64, 8), (8, 8), (8, 8), (8, 3)))

        def forward(self, x: Tensor) -> Tensor:
            x = F.gelu(self.stem(x.flatten(1)))
            return self.head(F.gelu(self.q(x) * self.k(x) + x))  # type: ignore[no-any-return]

    model = placed(Shared())
    assert quantised_values(model) == ["gelu"]
    assert readers(model, "gelu") == {"q", "k"}  # the sum reads the float value


def test_an_included_stem_reads_the_quantised_image() -> None:
    model = placed(tiny_cnn(), include=["stem"])
    [image] = [node for node in model.graph.graph.nodes if node.op == "placeholder"]
    assert quantised_values(model)[0] == image.name
    assert readers(model, image.name) == {"stem"}


@both_outputs
def test_logits_are_not_quantised(outputs: Outputs) -> None:
    for make in MODELS:
        model = placed(make(), outputs, include=["*"])
        [output] = [node for node in model.graph.graph.nodes if node.op == "output"]
        assert not set(output.all_input_nodes) & set(quantizer_nodes(model.graph).values())


def test_a_value_that_is_also_the_output_is_quantised_for_its_layers() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(F.gelu(self.stem(x.flatten(1))))
            return torch.cat([x, self.b(x)], 1)

    model = placed(Both(), include=["*"])
    assert readers(model, "a") == {"b"}


def test_a_fetched_weight_is_quantised_at_its_function() -> None:
    class Fetched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.head = nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.gelu(self.stem(x.flatten(1)))
            return self.head(F.gelu(F.linear(input=x, weight=self.a.weight, bias=self.a.bias)))  # type: ignore[no-any-return]

    model = placed(Fetched())
    assert readers(model, "gelu") == {"linear"}
    assert quantizers_before(model.graph, ["a"]) == ["quantizers.gelu"]


@both_outputs
@pytest.mark.parametrize("make", MODELS)
def test_a_second_graph_with_the_same_nodes_gets_the_same_quantizers(make: object, outputs: Outputs) -> None:
    model: Model = make()  # type: ignore[operator]
    other = copy.deepcopy(model.graph)
    places = sites(model, layers_of(model), outputs)
    names = insert(model.graph, places, "s8")
    assert insert(other, places, "s8") == names == list(quantizers(model.graph))
    assert [node.name for node in other.graph.nodes] == [node.name for node in model.graph.graph.nodes]
    assert all(module.kind == "s8" for module in quantizers(other).values())
