"""Layers given back to floating point: the costliest first, until the limit holds, and no more."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpcompile.data.images import Data, Split
from mpcompile.errors import PassError
from mpcompile.frontend.capture import capture
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.ir.quantization import quantizers
from mpcompile.passes import NMMask, Quantize
from mpcompile.passes.dense_comparison import outputs_of
from mpcompile.passes.quantize.mixed_precision import Limit, layer_costs, within_limit
from mpcompile.passes.quantize.placement import insert, quantizers_before, sites
from mpcompile.passes.quantize.policy import quantizable
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.testing import Noise, tiny_cnn, tiny_source, tiny_vit


class Fragile(nn.Module):
    """Three hidden layers; one input of `fragile` is 100 times the others, and its weight is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Linear(64, 32), nn.Linear(32, 32)
        self.second, self.fragile, self.head = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 10)
        with torch.no_grad():
            for layer in (self.stem, self.first, self.second, self.fragile, self.head):
                nn.init.normal_(layer.weight, std=1.5 * layer.in_features**-0.5)
                nn.init.zeros_(layer.bias)
            self.second.weight[0] *= 100
            self.fragile.weight[:, 0] = 0

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.first(F.gelu(self.stem(x.flatten(1)))))
        return self.head(F.gelu(self.fragile(F.gelu(self.second(x)))))  # type: ignore[no-any-return]


class Labelled(Noise):
    """Noise images with the classes that a model gives them, so that its accuracy is 100 %."""

    def __init__(self, model: Model, count: int, seed: int) -> None:
        super().__init__((1, 8, 8), count, seed)
        images = torch.stack([super(Labelled, self).__getitem__(index)[0] for index in range(count)])
        object.__setattr__(self, "labels", model(images).argmax(1).tolist())

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return super().__getitem__(index)[0], self.labels[index]  # type: ignore[attr-defined]


def data_for(model: Model, count: int = 256) -> Data:
    def split(seed: int) -> Split:
        return Split(Labelled(model, count, seed), tuple(range(count)), labelled=True)

    return Data(split(0), validation=split(1))


def fragile() -> Model:
    torch.manual_seed(0)
    return capture(Fragile().eval(), tiny_source())


def outlier_before_the_last_layer() -> Model:
    """A model in which `second` loses much, and a layer after it is quantised too."""
    model = fragile()
    with torch.no_grad():
        for name, factor in (("second", 1 / 100), ("first", 100)):
            model.layer(name).weight[0] *= factor
        model.layer("second").weight[:, 0] = 0
    return model


def accuracy(model: Model, data: Data) -> float:
    labels = torch.cat([labels for _, labels in data.validation.batches()])
    return float((model(data.validation.first(len(labels))).argmax(1) == labels).double().mean())


STEP = Quantize(observer="min-max", max_drop=0.0)


def test_the_layer_that_loses_most_is_given_back_first() -> None:
    model = fragile()
    data = data_for(model)
    quantised, _ = PassManager([replace(STEP, max_drop=None)]).run(model, data)
    assert accuracy(quantised, data) < 0.95
    result, [record] = PassManager([replace(STEP, max_drop=3.0)]).run(model, data)
    assert accuracy(result, data) >= 0.97
    returned = [name for name, plan in result.plan.items() if plan.unquantized and "given back" in plan.unquantized]
    assert returned == ["fragile"]
    plan = result.plan["fragile"]
    assert str(plan.unquantized).startswith("given back to floating point: its 8 bits moved the outputs by ")
    assert float(str(plan.unquantized).rpartition(" ")[2]) > 0
    assert plan.scale is None
    assert plan.rounding_error is None
    assert torch.equal(result.layer("fragile").weight, model.layer("fragile").weight)
    assert torch.equal(result.layer("fragile").bias, model.layer("fragile").bias)  # type: ignore[arg-type]
    assert quantizers_before(result.graph, ["fragile"]) == []
    assert set(quantizers(result.graph)) == {"quantizers.gelu", "quantizers.gelu_1"}
    [note] = [note for note in record.notes if "given back" in note]
    lost = 100 * (1 - accuracy(quantised, data))
    left = 100 * (1 - accuracy(result, data))
    assert note == (
        f"8 bits lost {lost:.2f} points of accuracy, 3 are allowed; 1 layers given back to floating point, which "
        f"leaves {left:.2f}"
    )


def test_with_a_limit_of_0_points_the_accuracy_is_the_dense_one() -> None:
    model = fragile()
    data = data_for(model)
    result, _ = PassManager([STEP]).run(model, data)
    assert accuracy(result, data) == 1
    assert result.plan["fragile"].scale is None


def test_nothing_is_given_back_within_the_limit() -> None:
    model = fragile()
    result, [record] = PassManager([replace(STEP, max_drop=100.0)]).run(model, data_for(model))
    assert set(result.scales()) == {"first", "second", "fragile"}
    assert not any("given back" in note for note in record.notes)


def test_layers_are_given_back_only_for_what_8_bits_lose() -> None:
    """Masks alone exceed the limit: the drop must fall to theirs, and the note says what it is."""
    model = fragile()
    data = data_for(model)
    masks = NMMask(NM(1, 4), "magnitude", "none")
    masked, _ = PassManager([masks]).run(model, data)
    alone = 1 - accuracy(masked, data)
    assert alone > 0.05
    result, [_, record] = PassManager([masks, STEP]).run(model, data)
    assert 1 - accuracy(result, data) <= alone
    kept = set(result.scales())
    for note in record.notes:
        if "given back" in note:
            assert note.endswith(f"; without quantisation the model loses {100 * alone:.2f}")
            break
    else:
        assert kept == {"first", "second", "fragile"}
    assert kept  # not all layers, in vain


def test_the_result_is_that_of_a_run_without_the_layers_given_back() -> None:
    """Layers after one that is given back are fitted to its float outputs, so that no more than this one is."""
    model = outlier_before_the_last_layer()
    data = data_for(model)
    result, _ = PassManager([replace(STEP, max_drop=2.0)]).run(model, data)
    assert [name for name, plan in result.plan.items() if "given back" in str(plan.unquantized)] == ["second"]
    excluded, _ = PassManager([replace(STEP, max_drop=None, exclude=("second",))]).run(model, data)
    assert str(result.graph.graph) == str(excluded.graph.graph)
    for name, value in result.graph.state_dict().items():
        assert torch.equal(value, excluded.graph.state_dict()[name]), name


def test_all_layers_given_back_are_the_float_model_again() -> None:
    """In a CNN, outputs of convolutions and sides of residual adds are quantised too; none of it may stay."""
    model = tiny_cnn()
    with torch.no_grad():
        model.layer("head").weight.mul_(50)  # else the bias decides, and the classes are all one
    layers = [name for name, reason in quantizable(model).items() if reason is None]
    data = data_for(model, 64)

    def broken(layers: Sequence[str]) -> Model:
        """The model with these layers quantised so coarsely that everything is 0."""
        copied = replace(model, graph=copy.deepcopy(model.graph))
        insert(copied.graph, sites(model, layers, "convolutions"), "u8")
        for module in quantizers(copied.graph).values():
            module.set_range(0.0, 1e4)
        return copied

    with torch.no_grad():
        limit = Limit(0.0, data.validation, outputs_of(model.graph, data.validation), None)
        result, note = within_limit(broken(layers), model, layers, limit, broken)
    assert note is not None
    assert note.endswith(f"{len(layers)} layers given back to floating point, which leaves 0.00")
    assert quantizers(result.graph) == {}
    assert torch.equal(result(model.example), model(model.example))
    assert all("given back" in str(result.plan[name].unquantized) for name in layers)


@pytest.mark.parametrize("needed", [1, 2, 3, 5, 7])
def test_as_few_as_needed_are_given_back(needed: int) -> None:
    model = tiny_vit()
    with torch.no_grad():
        model.layer("head").weight.mul_(50)
    layers = [name for name, reason in quantizable(model).items() if reason is None]
    data = data_for(model, 64)
    tried: list[int] = []

    def quantised(left: Sequence[str]) -> Model:
        tried.append(len(left))
        copied = replace(model, graph=copy.deepcopy(model.graph))
        if len(left) > len(layers) - needed:
            copied.layer("head").weight.zero_()
        return copied

    with torch.no_grad():
        limit = Limit(0.0, data.validation, outputs_of(model.graph, data.validation), None)
        result, _ = within_limit(quantised(layers), model, layers, limit, quantised)
    assert sum("given back" in str(plan.unquantized) for plan in result.plan.values()) == needed
    assert len(tried) - 1 <= 3  # log₂ of 8


def test_costs_are_measured_without_changing_the_model() -> None:
    model = fragile()
    data = data_for(model, 64)
    quantised, _ = PassManager([replace(STEP, max_drop=None)]).run(model, data)
    state = copy.deepcopy(quantised.graph.state_dict())
    outputs = quantised(model.example)
    with torch.no_grad():
        costs = layer_costs(quantised, model.graph, ["first", "second", "fragile"], data.validation)
    assert max(costs, key=costs.__getitem__) == "fragile"
    assert costs["fragile"] > 5 * max(abs(costs["first"]), abs(costs["second"]))
    assert all(torch.equal(value, state[name]) for name, value in quantised.graph.state_dict().items())
    assert torch.equal(quantised(model.example), outputs)


def test_the_norm_that_absorbed_a_mean_shift_is_given_back_with_its_layer() -> None:
    class NormedConv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 1, bias=False)
            self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.norm(self.a(F.relu(self.stem(x))))).mean((2, 3)))  # type: ignore[no-any-return]

    model = capture(NormedConv().eval(), tiny_source())
    with torch.no_grad():
        model.layer("head").weight.mul_(50)  # else the bias decides, and the classes are all one
    data = data_for(model, 64)
    quantised, _ = PassManager([replace(STEP, max_drop=None)]).run(model, data)
    mean = quantised.graph.get_buffer("norm.running_mean").clone()
    assert not torch.equal(mean, model.graph.get_buffer("norm.running_mean"))
    with torch.no_grad():
        layer_costs(quantised, model.graph, ["a"], data.validation)
        assert torch.equal(quantised.graph.get_buffer("norm.running_mean"), mean)
        for module in quantizers(quantised.graph).values():
            module.set_range(0.0, 1e4)  # so coarse that all images get one class
        limit = Limit(0.0, data.validation, outputs_of(model.graph, data.validation), None)
        result, note = within_limit(quantised, model, ["a"], limit, lambda layers: quantised)
    assert note is not None
    assert torch.equal(result.graph.get_buffer("norm.running_mean"), model.graph.get_buffer("norm.running_mean"))


def test_a_limit_needs_labels() -> None:
    model = fragile()
    images = Split(Noise((1, 8, 8), 32), tuple(range(32)), labelled=False)
    text = "max_drop needs labels, and the validation images have none; leave max_drop out"
    with pytest.raises(PassError, match=text):
        PassManager([STEP]).require_inputs(model, Data(images, validation=images))
    with pytest.raises(PassError, match=text):
        PassManager([STEP]).run(model, Data(images, validation=images))
