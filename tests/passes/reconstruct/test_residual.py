"""Residual sums: which are found, what a layer is asked for there, and that the sum comes nearer for it."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.resnet import Bottleneck, ResNet

from mpcompile.data.images import Data
from mpcompile.frontend.capture import capture
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.passes import NMMask
from mpcompile.passes.reconstruct.residual import join_after
from mpcompile.passes.reconstruct.second_moments import columns
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.testing import tiny_cnn, tiny_data, tiny_source, tiny_vit


def found(model: Model) -> dict[str, str]:
    """For each layer with a join the node that gives the other value."""
    joins = {str(n.target): join_after(model, n) for n in model.graph.graph.nodes if n.op == "call_module"}
    layers = [name for name, _ in model.layers()]
    return {name: join.other.name for name in layers if (join := joins.get(name)) is not None}


def value_of(model: Model, node: str, images: Tensor) -> Tensor:
    """What a node gives for these images."""
    seen: dict[str, Tensor] = {}

    class Keeping(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            seen[n.name] = result = super().run_node(n)
            return result

    with torch.no_grad():
        Keeping(model.graph).run(images)
    return seen[node]


class Branch(nn.Module):
    """x + γ ⊙ P(norm(last(gelu(first(x))))), in one of several spellings, after a layer that is masked."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.stem, self.before = nn.Conv2d(1, 16, 1), nn.Conv2d(16, 16, 1)
        self.first, self.last = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 16, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.gamma = nn.Parameter(torch.linspace(-2, 1, 16) + 0.05)  # none is next to nothing
        self.drop, self.keep = nn.Dropout(0.5), nn.Identity()
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(nn.functional.gelu(self.stem(x)))
        y = self.norm(self.last(nn.functional.gelu(self.first(x))))
        if self.spelling == "permuted":
            y = (y.permute(0, 2, 3, 1) * self.gamma).transpose(-1, 1).transpose(2, 3)
        elif self.spelling == "activation":
            y = nn.functional.relu(y)
        elif self.spelling == "gate":
            y = y * y.mean((2, 3), keepdim=True)
        elif self.spelling == "twice":
            y = y + y.mean()
        elif self.spelling == "broadcast":
            return self.head((y + x.mean((2, 3), keepdim=True)).mean((2, 3)))  # type: ignore[no-any-return]
        elif self.spelling == "dropped":
            y = nn.functional.dropout(y, 0.5, True, False)
        elif self.spelling == "scaled":
            y = self.gamma.reshape(1, -1, 1, 1) * nn.functional.dropout(self.drop(self.keep(y)), 0.5, False)
        x = y + self.keep(x) if self.spelling == "late" else x + y
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def branch(spelling: str) -> Model:
    torch.manual_seed(0)
    module = Branch(spelling).eval()
    with torch.no_grad():
        module.norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
        module.norm.weight.uniform_(-2, 2)
    return capture(module, tiny_source())


@pytest.mark.parametrize("spelling", ["plain", "permuted", "scaled", "late"])
def test_sums_are_found_through_what_does_not_depend_on_the_image(spelling: str) -> None:
    assert found(branch(spelling)) == {"last": "before"}


@pytest.mark.parametrize("spelling", ["activation", "gate", "twice", "broadcast"])
def test_where_the_branch_is_not_a_scaled_layer_nothing_is_asked(spelling: str) -> None:
    assert found(branch(spelling)) == {}


def test_dropout_that_is_always_on_is_no_identity() -> None:
    model = replace(branch("plain"), graph=fx.symbolic_trace(Branch("dropped").eval()))  # capture takes none that is
    assert found(model) == {}


def test_the_sums_of_known_architectures_are_found() -> None:
    assert found(tiny_cnn()) == {"body": "relu"}
    assert found(tiny_vit()) == {
        "blocks.0.attn.proj": "norm_pre", "blocks.0.mlp.fc2": "add_1",
        "blocks.1.attn.proj": "add_2", "blocks.1.mlp.fc2": "add_3",
    }  # fmt: skip
    # Each sum has one layer that comes last, of two where there is one on either side.
    resnet = ResNet(Bottleneck, [2, 1, 1, 1])
    assert [*found(capture(resnet.eval(), tiny_source((3, 64, 64))))] == [
        "layer1.0.downsample.0", "layer1.1.conv3", *(f"layer{n}.0.downsample.0" for n in (2, 3, 4))
    ]  # fmt: skip
    # Learned scales of branches, axes that are moved to and fro, depth that is stochastic in training alone.
    convnext = ConvNeXt([CNBlockConfig(16, None, 2)], stochastic_depth_prob=0.1)
    assert [*found(capture(convnext.eval(), tiny_source((3, 64, 64))))] == [
        "features.1.0.block.5",
        "features.1.1.block.5",
    ]
    inverted = timm.create_model("mobilenetv2_035").eval()
    assert {name.rpartition(".")[2] for name in found(capture(inverted, tiny_source((3, 64, 64))))} == {"conv_pwl"}


@pytest.mark.parametrize("spelling", ["plain", "permuted", "scaled", "late"])
@settings(max_examples=10)  # a run of the graph each
@given(seed=st.integers(0, 1000))
def test_what_is_asked_moves_the_sum_by_what_is_missing(spelling: str, seed: int) -> None:
    model = branch(spelling)
    graph = model.graph.graph
    [node] = [n for n in graph.nodes if n.target == "last"]
    join = join_after(model, node)
    assert join is not None
    rng = torch.Generator().manual_seed(seed)
    pixels = torch.randn(2, 1, 8, 8, generator=rng)
    was, now = torch.randn(2, 2, 16, 8, 8, generator=rng)
    output = value_of(model, "last", pixels)
    missing = join.missing(was, now)
    assert missing.shape == output.shape

    class Moved(fx.Interpreter):
        """Runs the graph with s and the layer's output replaced; keeps the sum."""

        def __init__(self, s: Tensor, y: Tensor) -> None:
            super().__init__(model.graph)
            self.given, self.total = {"before": s, "last": y}, torch.empty(0)

        def run_node(self, n: fx.Node) -> object:
            result = super().run_node(n)
            if n.name.startswith("add"):
                self.total = result
            return self.given.get(n.name, result)

    sums = []
    for s, y in ((was, output), (now, output + missing)):
        runner = Moved(s, y)
        with torch.no_grad():
            runner.run(pixels)
        sums.append(runner.total)
    # float32: the correction is divided by a factor and multiplied by it again; factors down to 1e-3 of the largest.
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-4, atol=1e-4)


def test_channels_that_hardly_reach_the_sum_are_asked_for_nothing() -> None:
    torch.manual_seed(0)
    module = Branch("scaled").eval()
    with torch.no_grad():
        module.gamma[3], module.gamma[5] = 0.0, 1e-9
    model = capture(module, tiny_source())
    [node] = [n for n in model.graph.graph.nodes if n.target == "last"]
    join = join_after(model, node)
    assert join is not None
    missing = join.missing(torch.ones(1, 16, 2, 2), torch.zeros(1, 16, 2, 2))
    assert missing.isfinite().all()
    assert [int(c) for c in (missing[0, :, 0, 0] == 0).nonzero()] == [3, 5]


def test_the_fit_is_the_least_squares_solution_for_the_sum() -> None:
    model = branch("permuted")
    data, step = tiny_data(model), NMMask(NM(2, 4))
    result, _ = PassManager([step]).run(model, data)
    images = data.calibration.first(len(data.calibration))
    layer, mask = result.layer("last"), result.plan_of("last").mask
    assert isinstance(layer, nn.Conv2d)
    assert mask is not None
    rows = columns(layer, value_of(result, "gelu_1", images))[0].double()
    dense = {side: value_of(model, side, images) for side in ("before", "last")}
    lost = (dense["before"] - value_of(result, "before", images)).movedim(1, -1).reshape(-1, 16).double()
    gamma, norm = model.graph.get_parameter("gamma").detach(), model.graph.get_submodule("norm")
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_var is not None
    factor = (norm.weight.detach() / (norm.running_var + norm.eps).sqrt() * gamma).double()
    wanted = (dense["last"].movedim(1, -1).reshape(-1, 16).double() + lost / factor).numpy()
    a = (rows - rows.mean(0)).numpy()
    power = np.square(a).mean()
    own = model.layer("last").weight.detach().double().flatten(1).numpy()
    for channel in range(16):
        kept = mask[channel].flatten().numpy()
        pull = np.sqrt(step.damping * power * len(a))
        system = np.concatenate([a[:, kept], pull * np.eye(kept.sum())])
        b = wanted[:, channel] - wanted[:, channel].mean()
        weight = np.linalg.lstsq(system, np.concatenate([b, pull * own[channel, kept]]), rcond=None)[0]
        # Weights are stored in float32; sums of products of inputs are too.
        np.testing.assert_allclose(layer.weight[channel].detach().flatten().numpy()[kept], weight, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("make", [tiny_vit, lambda: branch("plain"), lambda: branch("scaled")])
def test_sums_and_outputs_come_nearer(make: object) -> None:
    model: Model = make()  # type: ignore[operator]
    data = tiny_data(model, 128)
    images = data.calibration.first(128)

    def run(residual: bool) -> Model:
        return PassManager([NMMask(NM(1, 4), residual=residual)]).run(model, data)[0]

    def off(result: Model, node: str) -> float:
        return float((value_of(result, node, images) - value_of(model, node, images)).double().square().sum())

    sums = [node.name for node in model.graph.graph.nodes if node.name.startswith("add")]
    with_it, without = run(True), run(False)
    # The sum is what is fitted, on these images, but for the pull and for what the mask then keeps.
    assert off(with_it, sums[-1]) < off(without, sums[-1])
    assert off(with_it, "output") < off(without, "output")


def test_not_sequential_and_without_refit_nothing_is_asked() -> None:
    model = tiny_vit()
    data = tiny_data(model)
    for options in ({"sequential": False}, {"refit": "layer"}, {"refit": "none", "criterion": "wanda"}):
        one, other = (
            PassManager([NMMask(NM(2, 4), residual=residual, **options)]).run(model, data)[0]
            for residual in (True, False)
        )
        for (name, a), b in zip(one.graph.state_dict().items(), other.graph.state_dict().values(), strict=True):
            assert torch.equal(a, b), (options, name)


def test_the_dense_graph_and_the_model_given_are_left_alone() -> None:
    model = tiny_cnn()
    before = copy.deepcopy(model.graph.state_dict())
    PassManager([NMMask(NM(2, 4))]).run(model, Data(calibration=tiny_data(model).calibration))
    for name, value in model.graph.state_dict().items():
        assert torch.equal(value, before[name]), name
