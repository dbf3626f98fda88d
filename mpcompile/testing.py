"""Helpers for testing a pass: tiny models (MLP, CNN, ViT), and assertions with stated tolerances.

For this project's tests and for the tests of your own passes:

    check_contract(MyPass(), tiny_vit())
"""

import copy
import dataclasses
from typing import no_type_check

import torch
import torch.nn.functional as F
from jaxtyping import Shaped
from torch import Tensor, nn

from mpcompile.data.images import Data, Split
from mpcompile.frontend.capture import capture
from mpcompile.ir.model import Model
from mpcompile.ir.parity import relative_difference
from mpcompile.ir.pattern import NM
from mpcompile.ir.source import Source
from mpcompile.ir.weight_groups import pattern_violation, violation
from mpcompile.pipeline.pass_manager import Pass, PassManager
from mpcompile.pipeline.pass_record import Effect


def assert_same_function(before: nn.Module, after: nn.Module, images: Tensor, tolerance: float) -> None:
    """Asserts that two modules give the same outputs: max |Δ| / max |expected| is at most `tolerance`.

    The tolerance has no default: state it, with its reason, where it is used.
    """
    with torch.no_grad():
        expected, found = before(images), after(images)
    assert expected.shape == found.shape, f"outputs are {tuple(found.shape)}, expected {tuple(expected.shape)}"
    difference = relative_difference(expected.numpy(force=True), found.numpy(force=True))
    assert difference <= tolerance, (
        f"outputs differ by {difference:.2e} of the largest output, {tolerance:.0e} is allowed"
    )


def assert_follows(weight: Shaped[Tensor, "out in_ *taps"], pattern: NM) -> None:
    """Asserts that the non-zeros of a weight satisfy an N:M pattern."""
    broken = pattern_violation(weight != 0, pattern)
    assert broken is None, f"not {pattern}: {broken}"


def check_contract(step: Pass, model: Model, data: Data | None = None) -> Model:
    """Runs a pass and asserts the contract that every pass must keep. Returns the resulting model.

    - The pass is a frozen dataclass with `name`, `effect` and `requires`.
    - The input model is unchanged.
    - The resulting graph lints, runs, and has the same output shape.
    - The declared effect holds.
    - If any layer has a mask, every other layer has a reason why it has none.
    - An ANALYSIS or EXACT pass that runs a second time changes no outputs.
    """
    assert isinstance(step, Pass), f"{type(step).__name__} lacks name, effect, requires or __call__"
    assert dataclasses.is_dataclass(step), f"{type(step).__name__} is not a dataclass"
    assert step.__dataclass_params__.frozen, f"{type(step).__name__} is not frozen"
    before = copy.deepcopy(model.graph.state_dict())
    plan_before = dict(model.plan)

    data = data or Data()
    unordered = _WithoutRequires(step)
    result, [record] = PassManager([unordered]).run(model, data)

    after = model.graph.state_dict()
    assert before.keys() == after.keys(), f"{step.name} changed the modules of the model it was given"
    assert all(torch.equal(before[name], after[name]) for name in before), (
        f"{step.name} changed the weights it was given"
    )
    assert dict(model.plan) == plan_before, f"{step.name} changed the plan it was given"
    assert record.name == step.name
    for name, layer in result.layers():
        plan = result.plan_of(name)
        assert violation(layer, plan) is None
        written = name in record.layers_changed
        assert not (written and plan.mask is None and plan == model.plan_of(name)), (
            f"{step.name} wrote nothing to {name}"
        )
    if any(plan.mask is not None for plan in result.plan.values()):
        silent = [n for n, _ in result.layers() if result.plan_of(n).mask is None and not result.plan_of(n).skipped]
        assert not silent, f"{step.name} left {silent} dense without a reason"
    if step.effect is not Effect.LOSSY:
        again, _ = PassManager([unordered]).run(result, data)
        # The same bound as the manager's for one exact pass: a second run reorders sums once more.
        assert_same_function(result.graph, again.graph, result.example, tolerance=1e-4)
    return result


@dataclasses.dataclass(frozen=True)
class _WithoutRequires:
    """A pass without its `requires`, so that it can run alone."""

    inner: Pass

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def effect(self) -> Effect:
        return self.inner.effect

    @property
    def requires(self) -> tuple[str, ...]:
        return ()

    def __call__(self, model: Model, data: Data) -> Model:
        return self.inner(model, data)


@dataclasses.dataclass(frozen=True)
class Noise:
    """Images of standard normal noise, drawn from `seed` and the image's index; labels cycle through the classes."""

    size: tuple[int, ...]
    count: int
    seed: int = 0
    classes: int = 10

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        rng = torch.Generator().manual_seed(self.seed * self.count + index)
        return torch.randn(self.size, generator=rng), index % self.classes


def tiny_data(model: Model, count: int = 64) -> Data:
    """Noise images for a tiny model: `count` each for calibration, validation and evaluation."""

    def split(seed: int) -> Split:
        images = Noise(tuple(model.example.shape[1:]), count, seed)
        return Split(images, tuple(range(count)), labelled=True)

    return Data(split(0), split(1), validation=split(2))


class TinyMLP(nn.Module):
    """Three Linear layers over a flattened image."""

    def __init__(self, pixels: int = 64, width: int = 32, outputs: int = 10) -> None:
        super().__init__()
        self.stem = nn.Linear(pixels, width)
        self.hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, outputs)

    @no_type_check  # torch.fx traces it with proxies, which beartype's checks of annotations reject
    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.stem(x.flatten(1)))
        y: Tensor = self.head(F.gelu(self.hidden(x)))
        return y


class TinyCNN(nn.Module):
    """A stem, a residual block, a depthwise and a grouped convolution, with BatchNorm."""

    def __init__(self, outputs: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.body = nn.Conv2d(16, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(16, 24, 1, groups=2)
        self.odd = nn.Conv2d(24, 6, 1)
        self.widen = nn.Conv2d(6, 16, 1)
        self.head = nn.Linear(16, outputs)

    @no_type_check  # torch.fx traces it with proxies, which beartype's checks of annotations reject
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.body(x))
        x = F.relu(self.odd(F.relu(self.grouped(self.depthwise(x)))))
        y: Tensor = self.head(F.relu(self.widen(x)).mean((2, 3)))
        return y


def tiny_source(size: tuple[int, int, int] = (1, 8, 8)) -> Source:
    """The Source of the tiny models: a name and an input size, no file."""
    return Source(name="tiny", sha256="", arch="tiny", size=size, mean=(0.5,) * size[0], std=(0.5,) * size[0])


def tiny_mlp(seed: int = 0) -> Model:
    """A captured TinyMLP with random weights."""
    return capture(_seeded(TinyMLP(), seed), tiny_source())


def tiny_cnn(seed: int = 0) -> Model:
    """A captured TinyCNN with random weights and BatchNorm statistics."""
    return capture(_seeded(TinyCNN(), seed), tiny_source())


def tiny_vit(seed: int = 0) -> Model:
    """A captured timm VisionTransformer: 16 tokens of width 32, two blocks, random weights."""
    from timm.models.vision_transformer import VisionTransformer

    vit = VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=32, depth=2, num_heads=2, class_token=True
    )
    return capture(_seeded(vit, seed), tiny_source())


def _seeded(module: nn.Module, seed: int) -> nn.Module:
    """The module with all parameters and batch-norm statistics redrawn: none is zero, so every layer matters."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                drawn = (
                    torch.randn(value.shape, generator=rng) / max(1, value[0].numel() if value.ndim > 1 else 25) ** 0.5
                )
                value.copy_(
                    drawn.abs() + 0.5
                    if name.endswith("running_var")
                    else drawn + (value.ndim == 1 and name.endswith("weight"))
                )
    return module.eval()
