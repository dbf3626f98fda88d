"""Every pass on a device beside the CPU: it mixes no devices, and gives the bits of the CPU (tests/other_device.py)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from other_device import OTHER, other_device
from torch import fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mpcompile.data.images import Data
from mpcompile.errors import PassError, UsageError
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.ir.placement import place, placed
from mpcompile.passes import (
    PASSES,
    Certify,
    Distill,
    MPBudget,
    NMMask,
    Permute,
    Polish,
    Quantize,
    Restore,
    ToMe,
)
from mpcompile.passes.nm_mask.criteria import CRITERIA
from mpcompile.pipeline.checkpoint_file import State, rest_of
from mpcompile.pipeline.pass_manager import Pass, PassManager
from mpcompile.pipeline.pass_record import Effect
from mpcompile.recipe.schema import Recipe
from mpcompile.system import symmetric_matrices
from mpcompile.system.device import CPU, chosen_device
from mpcompile.testing import tiny_cnn, tiny_data, tiny_mlp, tiny_vit

BEFORE_MASKS = ("drop-unread-tokens", "mp-budget", "nm-mask", "permute", "scale-migration")
Make = Callable[[], Model]
QUICK: dict[str, Pass] = {"distill": Distill(epochs=1, batch=16, warmup=1), "polish": Polish(steps=10)}
OPTIONS: dict[str, tuple[Pass, ...]] = {
    **{f"criterion {name}": (NMMask(criterion=name),) for name in CRITERIA},
    "vocabulary": (NMMask(NM(2, 4, vocabulary=4)),),
    "shared rows": (NMMask(NM(2, 4, 2)),),
    "refit of layers": (NMMask(refit="layer"),),
    "sensitivity": (MPBudget((NM(2, 4), NM(1, 4)), macs=0.8, signal="sensitivity"),),
    "owl": (MPBudget((NM(2, 4), NM(1, 4)), macs=0.8, signal="owl"),),
    "magnitude order": (Permute(score="magnitude"),),
    "activation order": (Permute(score="activation"),),
    "restore": (NMMask(NM(1, 4)), Restore(max_drop=0.5, max_shift=0.1)),
    "certificate": (NMMask(), Certify(attribute=16)),
    "lanes, pairs": (NMMask(), Quantize(lanes="pairs")),
    "8 bits within a limit": (NMMask(), Quantize(max_drop=0.5)),
    "8 bits signed": (Quantize(activations="s8", observer="entropy"),),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """SciPy's factors, which are taken on a CPU alone, have other last digits than torch's."""
    monkeypatch.setattr(symmetric_matrices, "_on_cpu", lambda matrices: False)


def both(steps: tuple[Pass, ...], model: Model, data: Data) -> tuple[Model, Model]:
    """The result on the CPU and that on the other device. Both use the attention kernel that every device has."""
    with sdpa_kernel(SDPBackend.MATH):
        here, _ = PassManager(steps).run(model, data)
        with other_device() as device:
            there, _ = PassManager(steps).run(model, data, device=device)
    return here, there


@cache
def masked(make: Make) -> Model:
    """The model with masks. The case of nm-mask shows that those of the other device are the same."""
    with sdpa_kernel(SDPBackend.MATH):
        model = make()
        return PassManager([NMMask()]).run(model, tiny_data(model, 32))[0]


def assert_same(here: Model, there: Model) -> None:
    assert State.of(there) == State.of(here)
    assert rest_of(there) == rest_of(here)
    assert {value.device for value in (*there.graph.state_dict().values(), *there.masks().values())} == {CPU}


def cases(names: Iterable[str], makes: Sequence[Make]) -> list[Any]:
    """Each name with each model. Rounding to 8 bits takes many small steps, and is slow on this device."""
    in_8_bits = ("quantize", "8 bits", "lanes")
    return [
        pytest.param(
            name,
            make,
            marks=pytest.mark.slow if any(part in name for part in in_8_bits) and make is not tiny_mlp else (),
            id=f"{name}-{make.__name__}",
        )
        for name in names
        for make in makes
    ]


@pytest.mark.parametrize(("name", "make"), cases(PASSES, (tiny_mlp, tiny_cnn, tiny_vit)))
def test_every_pass(name: str, make: Make) -> None:
    if name == "tome" and make is not tiny_vit:
        pytest.skip("the model has no tokens")
    step, model = QUICK[name] if name in QUICK else PASSES[name](), make() if name in BEFORE_MASKS else masked(make)
    assert_same(*both((step,), model, tiny_data(model, 32)))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "make"), cases(OPTIONS, (tiny_vit, tiny_cnn)))
def test_options(name: str, make: Make) -> None:
    model = make()
    assert_same(*both(OPTIONS[name], model, tiny_data(model, 32)))


def test_token_merging_by_a_budget() -> None:
    model = tiny_vit()
    assert_same(*both((ToMe("auto", macs=0.9),), model, tiny_data(model, 32)))


class Mixes:
    """A pass that adds a tensor of the CPU to a weight."""

    name, effect, requires = "mixes", Effect.LOSSY, ()

    def __call__(self, model: Model, data: Data) -> Model:
        with torch.no_grad():
            for _, layer in model.layers():
                layer.weight.add_(torch.ones(layer.weight.shape, device="cpu"))
        return model


class MakesTensors:
    """A pass that adds a tensor that it makes without naming a device."""

    name, effect, requires = "makes-tensors", Effect.LOSSY, ()

    def __call__(self, model: Model, data: Data) -> Model:
        with torch.no_grad():
            for _, layer in model.layers():
                layer.weight.add_(torch.ones(layer.weight.shape))
        return model


class DrawsOnTheCPU:
    """A pass that draws with a generator of the CPU."""

    name, effect, requires = "draws", Effect.LOSSY, ()

    def __call__(self, model: Model, data: Data) -> Model:
        torch.rand(2, generator=torch.Generator("cpu"))
        return model


@pytest.mark.parametrize(
    ("step", "why"), [(Mixes(), "found some on the CPU"), (DrawsOnTheCPU(), "a generator of second_device")]
)
def test_a_pass_that_mixes_devices_is_found(step: Pass, why: str) -> None:
    model = tiny_mlp()
    PassManager([step]).run(model, Data())
    with other_device() as device, pytest.raises(PassError, match=why):
        PassManager([step]).run(model, Data(), device=device)


def test_tensors_are_made_on_the_device() -> None:
    assert_same(*both((MakesTensors(),), tiny_mlp(), Data()))  # type: ignore[arg-type]


class Tied(nn.Module):
    """Two layers with one weight, a buffer, and a tensor that names its device."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
        self.other.weight = self.one.weight
        self.register_buffer("shift", torch.ones(3))


def test_ties_constants_and_named_devices_move() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    scale = graph.call_function(torch.arange, (3,), {"device": CPU})
    product = graph.call_function(torch.mul, (graph.call_module("other", (graph.call_module("one", (x,)),)), scale))
    graph.output(graph.call_function(torch.add, (product, graph.get_attr("shift"))))
    module = fx.GraphModule(Tied(), graph)
    module.constant = torch.ones(2)  # kept by the module, neither parameter nor buffer
    given = torch.ones(2, 3)
    before = module(given)
    with other_device() as device:
        place(module, device)
        assert module.get_parameter("one.weight") is module.get_parameter("other.weight")
        assert {one.device for one in (module.get_parameter("one.weight"), module.shift, module.constant)} == {OTHER}
        there = module(given.to(device))
        assert there.device == OTHER
        assert torch.equal(there.cpu(), before)
        place(module, CPU)
        assert module.get_parameter("one.weight") is module.get_parameter("other.weight")
        assert torch.equal(module(given), before)


def test_a_plan_moves() -> None:
    masked, _ = PassManager([NMMask()]).run(tiny_mlp(), Data())
    with other_device() as device:
        there = placed(masked, device)
        assert {mask.device for mask in there.masks().values()} == {OTHER}
        assert there.example.device == OTHER


def test_images_are_put_on_the_device() -> None:
    data = tiny_data(tiny_mlp(), 32)
    assert data.on(CPU) is data
    with other_device() as device:
        moved = data.on(device).calibration
        for images, labels in moved.batches(8):
            assert {images.device, labels.device} == {OTHER}
        assert moved.first(2).device == OTHER
        assert list(moved.hashes()) == list(data.calibration.hashes())
        assert replace(moved, device=CPU) == data.calibration


@pytest.mark.parametrize("text", ["gpu", "cuda:", "cpu:1", "cuda:x", ""])
def test_unknown_devices(text: str) -> None:
    with pytest.raises(UsageError, match=f"device: '{text}' is no device on which passes run; give auto, cpu, cuda"):
        Recipe.checked({"device": text})


def test_mps_has_no_float64() -> None:
    with pytest.raises(UsageError, match="device: the passes solve in float64, which MPS does not have; give cpu"):
        Recipe.checked({"device": "mps"})


@pytest.mark.parametrize("text", ["auto", "cpu", "cuda", "cuda:3"])
def test_a_recipe_names_a_device_that_other_machines_may_have(text: str) -> None:
    assert Recipe.checked({"device": text}).device == text


def test_devices_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen_device("auto") == chosen_device("cpu") == CPU
    with pytest.raises(UsageError, match="the device cuda: PyTorch .* finds no CUDA device"):
        chosen_device("cuda")


def test_devices_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert chosen_device("auto") == chosen_device("cuda") == torch.device("cuda", 0)
    assert chosen_device("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert chosen_device("auto") == torch.device("cuda", 1)
    with pytest.raises(UsageError, match="the device cuda:2: there are 2 CUDA devices, numbered from 0"):
        chosen_device("cuda:2")
