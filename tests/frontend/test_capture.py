"""Capture: real architectures trace and compute the same, the caller's model is unchanged, refusals help."""

import copy
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from mpcompile.errors import CaptureError
from mpcompile.frontend.capture import capture, noise
from mpcompile.frontend.preprocessing import source_of
from mpcompile.ir.source import Source
from mpcompile.testing import TinyMLP, assert_same_function, tiny_source

# One of each kind that has caught something: distilled heads, optional arguments, functional weights, cached
# biases, windows, leaf functions. The whole table is benchmarks/capture.py. These have few layers of each kind, are
# narrow and take small images: the traces have the same operators.
SIDE = 64
TIMM: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"depth": 2, "img_size": SIDE},
    "deit_tiny_distilled_patch16_224": {"depth": 2, "img_size": SIDE},
    "vit_small_patch14_dinov2": {"depth": 2, "img_size": 56},
    "beit_base_patch16_224": {"depth": 2, "img_size": SIDE, "embed_dim": 96, "num_heads": 4},
    "eva02_tiny_patch14_224": {"depth": 2, "img_size": 56},
    "levit_128s": {"img_size": 128},
    "swin_tiny_patch4_window7_224": {"depths": (2, 2), "num_heads": (3, 6), "embed_dim": 24, "img_size": 112},
    "convnextv2_atto": {"depths": (1, 1, 2, 1), "dims": (16, 32, 48, 64)},
    "resnet18d": {"channels": (16, 32, 48, 64)},
    "regnety_002": {"w0": 16, "wa": 16.0, "wm": 1.7, "depth": 6},
    "tf_efficientnetv2_b0": {},
    "mobilenetv3_small_050": {},
    "hiera_tiny_224": {"stages": (1, 1, 2, 1), "embed_dim": 24, "img_size": (128, 128)},
    "poolformer_s12": {},
}
TORCHVISION: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "VisionTransformer": {
        "image_size": SIDE, "patch_size": 16, "num_layers": 2, "num_heads": 3, "hidden_dim": 48, "mlp_dim": 96,
    },
    "SwinTransformer": {
        "patch_size": [4, 4], "embed_dim": 24, "depths": [2, 2], "num_heads": [3, 6], "window_size": [7, 7],
    },
    "googlenet": {},
}  # fmt: skip


class Slow(TinyMLP):
    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.05)
        out: Tensor = super().forward(x)
        return out


def small(name: str) -> tuple[nn.Module, Source]:
    """A model of the table, and images that it takes."""
    args = TIMM[name]
    module = timm.create_model(name, **args)
    source = source_of(module, name=name, arch=name, sha256="", arch_args=args)
    return module, source if "img_size" in args else replace(source, size=(3, SIDE, SIDE))


@pytest.mark.parametrize("name", TIMM)
def test_timm_models_trace_twice_and_stay_as_they_were(name: str) -> None:
    module, source = small(name)
    module.train()
    before, attributes = copy.deepcopy(module.state_dict()), attribute_names(module)
    first, second = capture(module, source), capture(module, source)

    assert module.training
    assert attribute_names(module) == attributes
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert [node.op for node in first.graph.graph.nodes].count("placeholder") == 1
    # The same operators on the same values: at most a fused kernel rounds differently.
    assert_same_function(
        copy.deepcopy(module).eval(), second.graph, noise(source.size, batch=1, seed=7), tolerance=1e-5
    )
    assert {name for name, _ in first.layers()} <= {name for name, _ in module.named_modules()}


def attribute_names(module: nn.Module) -> dict[str, list[str]]:
    return {name: sorted(vars(child)) for name, child in module.named_modules()}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_models_trace(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # googlenet on its initialisation
        module = getattr(torchvision.models, name)(**TORCHVISION[name])
    capture(module, Source(name=name, sha256="", arch=name, size=(3, SIDE, SIDE)))


def test_weights_used_without_their_module_are_still_layers() -> None:
    names = {name for name, _ in capture(*small("beit_base_patch16_224")).layers()}
    assert "blocks.0.attn.qkv" in names


def test_shapes_are_recorded() -> None:
    model = capture(*small("resnet18d"))
    shapes = {
        str(n.target): tuple(n.meta["tensor_meta"].shape) for n in model.graph.graph.nodes if n.op == "call_module"
    }
    assert shapes["layer4.1.conv2"] == (2, 64, SIDE // 32, SIDE // 32)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = -x
        return self.head(x.flatten(1))  # type: ignore[no-any-return]


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Branches()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.inner(x)
        return y if mask is None else y * mask


def test_a_branch_on_values_is_refused_with_its_line() -> None:
    with pytest.raises(
        CaptureError, match=r"reads a value.*\(bool\).*test_capture.py:\d+: `if x.sum\(\) > 0:`.*--leaf inner"
    ) as error:
        capture(Outer(), tiny_source())
    assert error.value.exit_code == 3


class Asserts(Branches):
    def forward(self, x: Tensor) -> Tensor:
        torch._check_tensor_all(x < 100)
        return self.head(x.flatten(1))  # type: ignore[no-any-return]


def test_an_assertion_on_values_is_no_branch() -> None:
    model = capture(Asserts(), tiny_source())
    assert [node.op for node in model.graph.graph.nodes] == ["placeholder", "call_method", "call_module", "output"]


class PadsByShape(Branches):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 2:
            x = nn.functional.pad(x, (0, 1))
        return self.head(x.flatten(1))  # type: ignore[no-any-return]


class CutsByShape(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(64))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        first = self.get_buffer("table")[: x.shape[-1]]
        return self.head((x + first).mean((1, 2)))  # type: ignore[no-any-return]


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("inner", [PadsByShape, CutsByShape])
def test_a_shape_may_decide(inner: type[nn.Module]) -> None:
    capture(Around(inner()), tiny_source())  # compares the graph with the module in two batch sizes


class Counts(nn.Module):
    """Draws random numbers that change nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        torch.rand(1)
        return self.head(x.flatten(1))  # type: ignore[no-any-return]


def test_random_numbers_without_effect_are_told(caplog: pytest.LogCaptureFixture) -> None:
    capture(Counts(), tiny_source())
    assert "draws random numbers in evaluation mode" in caplog.text


def test_a_leaf_is_kept_whole_and_optional_arguments_vanish() -> None:
    model = capture(Outer(), tiny_source(), leaves=["inner"])
    assert [node.op for node in model.graph.graph.nodes] == ["placeholder", "call_module", "output"]
    assert [name for name, _ in model.layers()] == ["inner.head"]


def test_a_leaf_that_is_no_module_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"--leaf 'iner' is not a module of Outer; it has inner"):
        capture(Outer(), tiny_source(), leaves=["iner"])


class TwoOutputs(Branches):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return x, x


class Random(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1) + torch.randn(64))  # type: ignore[no-any-return]


class FixedBatch(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.reshape(2, 64))  # type: ignore[no-any-return]


class Infinite(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1)) / 0  # type: ignore[no-any-return]


class OneNumber(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1)).sum(1)  # type: ignore[no-any-return]


def test_half_precision_modules_are_captured_in_float32_and_doubles_in_float64() -> None:
    model = capture(TinyMLP().bfloat16(), tiny_source())
    assert model.example.dtype == model.layer("head").weight.dtype == torch.float32
    assert capture(TinyMLP().double(), tiny_source()).example.dtype == torch.float64


def test_two_threads_capture_at_once() -> None:
    # Slow enough that one is traced while another would run, which torch.fx breaks.
    modules = [Slow() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda module: capture(module, tiny_source()), modules))
    for module, model in zip(modules, models, strict=True):
        assert_same_function(module, model.graph, model.example, tolerance=1e-6)


def test_constant_outputs_are_told(caplog: pytest.LogCaptureFixture) -> None:
    module = TinyMLP()
    nn.init.zeros_(module.head.weight)
    capture(module, tiny_source())
    assert "returns the same outputs for every image" in caplog.text


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (OneNumber(), r"returns a tensor of shape \(2,\) for a batch of 2"),
        (Random(), "gives other outputs when the same images are run again.*draws random numbers"),
        (FixedBatch(), "does not run on a batch of shape \\(3, 1, 8, 8\\) alone"),
        (Infinite(), "not finite"),
        (nn.Linear(7, 2), "does not run on a batch of shape.*--input-size"),
    ],
)
def test_other_refusals(module: nn.Module, text: str) -> None:
    with pytest.raises(CaptureError, match=text):
        capture(module, tiny_source())


def test_images_are_as_the_module_says() -> None:
    module = TinyMLP()
    module.pretrained_cfg = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.25,)}  # type: ignore[assignment]
    model = capture(module)
    assert model.example.shape[1:] == (1, 8, 8)
    assert (model.source.mean, model.source.std) == ((0.5,), (0.25,))


def test_a_forward_that_an_instance_was_given_is_not_taken_for_its_layer() -> None:
    # The copy's forward is the original's closure, so a mask on the copy's weight would change nothing.
    module = TinyMLP()
    layer = module.head
    layer.forward = lambda x: nn.functional.linear(x, layer.weight) * 3  # type: ignore[assignment]
    model = capture(module, tiny_source())
    assert "head" not in [name for name, _ in model.layers()]
    with torch.no_grad():
        assert torch.equal(model(model.example), module(model.example))
