"""Residual adds: which are found, the residual error at the layer, and that fitting it brings the sum closer."""

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
from mpcompile.passes.reconstruct import cross_validation
from mpcompile.passes.reconstruct.cross_validation import Strength
from mpcompile.passes.reconstruct.layer_rows import columns
from mpcompile.passes.reconstruct.residual import residual_add_after
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.testing import tiny_cnn, tiny_data, tiny_source, tiny_vit


def skip_nodes(model: Model) -> dict[str, str]:
    """For each layer before a residual add, the node that computes the skip branch."""
    adds = {str(n.target): residual_add_after(model, n) for n in model.graph.graph.nodes if n.op == "call_module"}
    layers = [name for name, _ in model.layers()]
    return {name: add.skip.name for name in layers if (add := adds.get(name)) is not None}


def value_of(model: Model, node: str, images: Tensor) -> Tensor:
    """The value of a node for these images."""
    seen: dict[str, Tensor] = {}

    class Keeping(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            seen[n.name] = result = super().run_node(n)
            return result

    with torch.no_grad():
        Keeping(model.graph).run(images)
    return seen[node]


class Branch(nn.Module):
    """x + γ ⊙ P(norm(last(gelu(first(x))))), in one of several forms, after a layer that is masked."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.stem, self.before = nn.Conv2d(1, 16, 1), nn.Conv2d(16, 16, 1)
        self.first, self.last = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 16, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.gamma = nn.Parameter(torch.linspace(-2, 1, 16) + 0.05)  # none is next to nothing
        self.drop, self.keep = nn.Dropout(0.5), nn.Identity()
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(nn.functional.gelu(self.stem(x)))
        y = self.norm(self.last(nn.functional.gelu(self.first(x))))
        if self.form == "permuted":
            y = (y.permute(0, 2, 3, 1) * self.gamma).transpose(-1, 1).transpose(2, 3)
        elif self.form == "activation":
            y = nn.functional.relu(y)
        elif self.form == "gate":
            y = y * y.mean((2, 3), keepdim=True)
        elif self.form == "twice":
            y = y + y.mean()
        elif self.form == "broadcast":
            return self.head((y + x.mean((2, 3), keepdim=True)).mean((2, 3)))  # type: ignore[no-any-return]
        elif self.form == "dropped":
            y = nn.functional.dropout(y, 0.5, True, False)
        elif self.form == "scaled":
            y = self.gamma.reshape(1, -1, 1, 1) * nn.functional.dropout(self.drop(self.keep(y)), 0.5, False)
        x = y + self.keep(x) if self.form == "late" else x + y
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def branch(form: str) -> Model:
    torch.manual_seed(0)
    module = Branch(form).eval()
    with torch.no_grad():
        module.norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
        module.norm.weight.uniform_(-2, 2)
    return capture(module, tiny_source())


@pytest.mark.parametrize("form", ["plain", "permuted", "scaled", "late"])
def test_adds_are_found_through_scales_and_permutations(form: str) -> None:
    assert skip_nodes(branch(form)) == {"last": "before"}


@pytest.mark.parametrize("form", ["activation", "gate", "twice", "broadcast"])
def test_no_add_is_found_behind_an_operation_that_depends_on_the_image(form: str) -> None:
    assert skip_nodes(branch(form)) == {}


def test_dropout_in_training_mode_is_no_identity() -> None:
    model = replace(branch("plain"), graph=fx.symbolic_trace(Branch("dropped").eval()))  # capture refuses it
    assert skip_nodes(model) == {}


def test_the_residual_adds_of_known_architectures_are_found() -> None:
    assert skip_nodes(tiny_cnn()) == {"body": "relu"}
    assert skip_nodes(tiny_vit()) == {
        "blocks.0.attn.proj": "norm_pre", "blocks.0.mlp.fc2": "add_1",
        "blocks.1.attn.proj": "add_2", "blocks.1.mlp.fc2": "add_3",
    }  # fmt: skip
    # Where both branches end in a layer, the layer that runs last is the one before the add.
    resnet = ResNet(Bottleneck, [2, 1, 1, 1])
    assert [*skip_nodes(capture(resnet.eval(), tiny_source((3, 64, 64))))] == [
        "layer1.0.downsample.0", "layer1.1.conv3", *(f"layer{n}.0.downsample.0" for n in (2, 3, 4))
    ]  # fmt: skip
    # Learned branch scales, permuted axes, and stochastic depth, which is the identity in evaluation mode.
    convnext = ConvNeXt([CNBlockConfig(16, None, 2)], stochastic_depth_prob=0.1)
    assert [*skip_nodes(capture(convnext.eval(), tiny_source((3, 64, 64))))] == [
        "features.1.0.block.5",
        "features.1.1.block.5",
    ]
    inverted = timm.create_model("mobilenetv2_035").eval()
    assert {name.rpartition(".")[2] for name in skip_nodes(capture(inverted, tiny_source((3, 64, 64))))} == {"conv_pwl"}


@pytest.mark.parametrize("form", ["plain", "permuted", "scaled", "late"])
@settings(max_examples=10)  # a run of the graph each
@given(seed=st.integers(0, 1000))
def test_adding_the_error_at_the_layer_restores_the_sum(form: str, seed: int) -> None:
    model = branch(form)
    graph = model.graph.graph
    [node] = [n for n in graph.nodes if n.target == "last"]
    add = residual_add_after(model, node)
    assert add is not None
    rng = torch.Generator().manual_seed(seed)
    pixels = torch.randn(2, 1, 8, 8, generator=rng)
    was, now = torch.randn(2, 2, 16, 8, 8, generator=rng)
    output = value_of(model, "last", pixels)
    error = add.error_at_layer(was, now)
    assert error.shape == output.shape

    class Replaced(fx.Interpreter):
        """Runs the graph with other values for s and for the layer's output; keeps the sum."""

        def __init__(self, s: Tensor, y: Tensor) -> None:
            super().__init__(model.graph)
            self.given, self.total = {"before": s, "last": y}, torch.empty(0)

        def run_node(self, n: fx.Node) -> object:
            result = super().run_node(n)
            if n.name.startswith("add"):
                self.total = result
            return self.given.get(n.name, result)

    sums = []
    for s, y in ((was, output), (now, output + error)):
        runner = Replaced(s, y)
        with torch.no_grad():
            runner.run(pixels)
        sums.append(runner.total)
    # float32: the correction is divided by a factor and multiplied by it again; factors down to 1e-3 of the largest.
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-4, atol=1e-4)


def test_the_error_is_zero_in_channels_with_a_tiny_factor() -> None:
    torch.manual_seed(0)
    module = Branch("scaled").eval()
    with torch.no_grad():
        module.gamma[3], module.gamma[5] = 0.0, 1e-9
    model = capture(module, tiny_source())
    [node] = [n for n in model.graph.graph.nodes if n.target == "last"]
    add = residual_add_after(model, node)
    assert add is not None
    error = add.error_at_layer(torch.ones(1, 16, 2, 2), torch.zeros(1, 16, 2, 2))
    assert error.isfinite().all()
    assert [int(c) for c in (error[0, :, 0, 0] == 0).nonzero()] == [3, 5]


@pytest.mark.parametrize("strength", [Strength(0.02, 1.0, 1.0), Strength(0.3, 0.6, 0.25)])
def test_the_refit_is_the_least_squares_solution_for_the_sum(
    monkeypatch: pytest.MonkeyPatch, strength: Strength
) -> None:
    monkeypatch.setattr(cross_validation, "chosen_strength", lambda *_: strength)
    model = branch("permuted")
    data, step = tiny_data(model), NMMask(NM(2, 4), gain=False)
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
    a = (rows - rows.mean(0)).numpy()
    power = np.square(a).mean()
    own = model.layer("last").weight.detach().double().flatten(1).numpy()
    outputs, error = dense["last"].movedim(1, -1).reshape(-1, 16).double().numpy(), (lost / factor).numpy()
    wanted = strength.dense * outputs + (1 - strength.dense) * a @ own.T + strength.residual * error
    for channel in range(16):
        kept = mask[channel].flatten().numpy()
        pull = np.sqrt(strength.damping * power * len(a))
        system = np.concatenate([a[:, kept], pull * np.eye(kept.sum())])
        b = wanted[:, channel] - wanted[:, channel].mean()
        weight = np.linalg.lstsq(system, np.concatenate([b, pull * own[channel, kept]]), rcond=None)[0]
        # Weights are stored in float32; sums of products of inputs are too.
        np.testing.assert_allclose(layer.weight[channel].detach().flatten().numpy()[kept], weight, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("make", [tiny_vit, lambda: branch("plain"), lambda: branch("scaled")])
def test_sums_and_outputs_get_closer_to_the_dense_ones(make: object) -> None:
    model: Model = make()  # type: ignore[operator]
    data = tiny_data(model, 128)
    images = data.calibration.first(128)

    def run(residual: bool) -> Model:
        return PassManager([NMMask(NM(1, 4), residual=residual)]).run(model, data)[0]

    def off(result: Model, node: str) -> float:
        return float((value_of(result, node, images) - value_of(model, node, images)).double().square().sum())

    sums = [node.name for node in model.graph.graph.nodes if node.name.startswith("add")]
    with_it, without = run(True), run(False)
    # The fit minimizes the error of this sum on these images, apart from the ridge term and the mask.
    assert off(with_it, sums[-1]) < off(without, sums[-1])
    assert off(with_it, "output") < off(without, "output")


def test_residual_has_no_effect_unless_sequential_with_refit_to_the_model() -> None:
    model = tiny_vit()
    data = tiny_data(model)
    for options in ({"sequential": False}, {"refit": "layer"}, {"refit": "none", "criterion": "wanda"}):
        one, other = (
            PassManager([NMMask(NM(2, 4), residual=residual, **options)]).run(model, data)[0]
            for residual in (True, False)
        )
        for (name, a), b in zip(one.graph.state_dict().items(), other.graph.state_dict().values(), strict=True):
            assert torch.equal(a, b), (options, name)


def test_the_given_model_is_not_changed() -> None:
    model = tiny_cnn()
    before = copy.deepcopy(model.graph.state_dict())
    PassManager([NMMask(NM(2, 4))]).run(model, Data(calibration=tiny_data(model).calibration))
    for name, value in model.graph.state_dict().items():
        assert torch.equal(value, before[name]), name
