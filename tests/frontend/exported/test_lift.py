"""Lifted programs: same outputs for any batch, layers under their own names, and masks and merging as from Python."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from pt2_files import saved, small
from torch import Tensor, fx, nn

from mpcompile import NM
from mpcompile.data.images import Data
from mpcompile.errors import CaptureError, LoadError
from mpcompile.export.onnx_export import lower
from mpcompile.frontend.capture import capture
from mpcompile.frontend.exported import exported
from mpcompile.frontend.exported.lift import lift
from mpcompile.frontend.exported.program import program_of
from mpcompile.frontend.exported.read_program import read_program
from mpcompile.frontend.exported.refusal import ProgramRefused
from mpcompile.ir.model import Model
from mpcompile.passes import NMMask, Permute, ToMe
from mpcompile.pipeline.pass_manager import PassManager

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d, nn.GroupNorm)


def vit() -> nn.Module:
    torch.manual_seed(0)
    name, sizes = "vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 64, "num_heads": 4}
    model: nn.Module = timm.create_model(name, num_classes=10, **sizes).eval()
    return model


def swin() -> nn.Module:
    """With windows, shifted windows and their masks."""
    torch.manual_seed(0)
    sizes = {"img_size": 56, "patch_size": 2, "window_size": 7, "embed_dim": 32, "depths": (2,), "num_heads": (2,)}
    model: nn.Module = timm.create_model("swin_tiny_patch4_window7_224", num_classes=10, **sizes).eval()
    return model


def torchvision_vit() -> nn.Module:
    """With nn.MultiheadAttention, which works on (tokens, batch, channels)."""
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=10).eval()
    nn.init.normal_(model.get_parameter("heads.head.weight"))
    return model


def resnet() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("resnet10t", num_classes=10, channels=(16, 16, 32, 32), stem_width=8).eval()
    return model


def group_norm() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, groups=1), nn.GroupNorm(2, 8), nn.GELU(), nn.Flatten(), nn.LazyLinear(4)
    ).eval()


class OneDimensional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv1d(96, 16, 3, padding="same"), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(F.leaky_relu(self.stem(x.flatten(1, 2)), 0.2).mean(-1))
        return y


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x.mean(1)).relu())
        return y.mean(1)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "small": small,
    "vit": vit,
    "swin": swin,
    "torchvision vit": torchvision_vit,
    "resnet": resnet,
    "group norm": group_norm,
    "conv1d": OneDimensional,
    "tied": Tied,
}
SIDES = {"swin": 56}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_fixed_batch_becomes_free(name: str, batch: int) -> None:
    """torch.export.export(m, (x,)) is what users type; the file then holds the batch of x as numbers."""
    torch.manual_seed(0)
    side, model = SIDES.get(name, 32), MODELS[name]().eval()
    model(torch.zeros(1, 3, side, side))
    found = lift(read_program(saved(model, (torch.zeros(batch, 3, side, side),))))
    for count in (1, 3):
        images = torch.randn(count, 3, side, side)
        with torch.no_grad():
            torch.testing.assert_close(found(images), model(images), rtol=1e-5, atol=1e-5)
    assert found.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, found.state_dict()[key]) for key, value in model.state_dict().items())
    layers = {key: type(part) for key, part in found.named_modules()}
    for key, part in model.named_modules():
        if type(part) in LAYERS:
            assert layers[key] is type(part), key
    assert not [node for node in found.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]


def masked(model: Model) -> Model:
    return PassManager((Permute(NM(2, 4)), NMMask(NM(2, 4)))).run(model, Data())[0]


@pytest.mark.parametrize("make", [vit, resnet])
def test_masks_order_and_file_are_those_of_the_model_in_python(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model, example = make(), torch.randn(2, 3, 32, 32)
    lifted = lift(read_program(saved(model, (example[:1],))))
    one, other = (masked(capture(module, example=example)) for module in (model, lifted))
    assert one.plan.keys() == other.plan.keys()
    for name, plan in one.plan.items():
        again = other.plan[name]
        assert (plan.mask is None) == (again.mask is None), name
        if plan.mask is not None and again.mask is not None:
            assert torch.equal(plan.mask, again.mask), name
        assert (plan.permutation is None) == (again.permutation is None), name
    assert sum(plan.permutation is not None for plan in one.plan.values()) > 3
    assert torch.equal(one(example), other(example))
    assert len(lower(other, tmp_path / "m.onnx").masks) == sum(plan.mask is not None for plan in one.plan.values())


@pytest.mark.parametrize("make", [vit, torchvision_vit])
def test_token_merging_works_as_in_python(make: Callable[[], nn.Module]) -> None:
    model, example = make(), torch.randn(2, 3, 32, 32)
    lifted = lift(read_program(saved(model, (example[:1],))))
    one, other = (
        PassManager((ToMe(2),)).run(capture(module, example=example), Data())[0] for module in (model, lifted)
    )
    torch.testing.assert_close(other(example), one(example), rtol=1e-5, atol=1e-5)
    assert not torch.equal(one(example), model(example))


class Structured(nn.Module):
    """Takes a tuple and a keyword, returns a dict with a list."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.other = small(), nn.Linear(2, 4)

    def forward(self, pair: tuple[Tensor, Tensor], *, scale: Tensor) -> dict[str, Any]:
        y = self.net(pair[0]) + self.other(pair[1])
        return {"logits": y * scale, "features": [y, y.relu()]}


def test_structures_of_arguments_and_results_stay() -> None:
    model = Structured().eval()
    given = ((torch.randn(2, 3, 8, 8), torch.randn(2, 2)),)
    found = lift(read_program(saved(model, given, {"scale": torch.ones(2, 1)})))
    pair, scale = (torch.randn(3, 3, 8, 8), torch.randn(3, 2)), torch.randn(3, 1)
    torch.testing.assert_close(found(pair, scale=scale), model(pair, scale=scale))


class Switched(nn.Module):
    """Has an optional argument, which export keeps as a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return self.net(x), mask


def test_an_argument_that_is_none_stays_optional() -> None:
    model = Switched().eval()
    found = lift(read_program(saved(model, (torch.randn(2, 3, 8, 8), None))))
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(found(x)[0], model(x)[0])
    assert found(x)[1] is None


class Modes(nn.Module):
    """With parts that run without gradients and with autocast off, as in many Hugging Face models."""

    def __init__(self, autocast: bool = False) -> None:
        super().__init__()
        self.head, self.autocast = nn.Linear(4, 4), autocast

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x.mean((2, 3)) * 2
        with torch.autocast("cpu", enabled=self.autocast):
            z: Tensor = self.head(F.pad(y, (0, 1)))
        return z.relu().float() + 1


def test_parts_in_another_mode_are_taken_in() -> None:
    model, x = Modes().eval(), torch.randn(3, 3, 4, 4)
    for found in (lift(read_program(saved(model, (x[:2],)))), exported(model, x)):
        torch.testing.assert_close(found(x), model(x))
        assert isinstance(found.get_submodule("head"), nn.Linear)
    with pytest.raises(ProgramRefused, match="export the model without torch.autocast"):
        read_program(saved(Modes(autocast=True), (x,)))
    with pytest.raises(CaptureError, match="export the model without torch.autocast"):
        exported(Modes(autocast=True), x)


def test_a_name_that_torch_fx_uses_is_refused() -> None:
    module = nn.Sequential()
    module.add_module("meta", nn.Linear(4, 4))
    with pytest.raises(ProgramRefused, match="a part named meta, which torch.fx uses itself; rename it"):
        lift(read_program(saved(module.eval(), (torch.zeros(2, 4),))))


class BatchStatistics(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0, keepdim=True)).flatten(1)


class BakedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) + torch.arange(2.0).reshape(2, 1)


@pytest.mark.parametrize("module", [BatchStatistics(), BakedBatch()])
def test_a_program_that_depends_on_its_batch_is_refused_with_what_to_type(module: nn.Module) -> None:
    with pytest.raises(ProgramRefused, match=r"batches of 2, and cannot be made free.*dynamic_shapes=\(\{0:"):
        lift(read_program(saved(module, (torch.randn(2, 3, 4, 4),))))


def test_training_mode_is_refused() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(48, 4)).train()
    with pytest.raises(ProgramRefused, match=r"exported in training mode \(dropout is active\); call model.eval"):
        lift(read_program(saved(module, (torch.randn(2, 3, 4, 4),))))


class WritesItsInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu_().flatten(1) * 2


class Counts(nn.Module):
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        return x.flatten(1) + self.seen


def test_in_place_writes_stay_where_nobody_sees_them() -> None:
    x = torch.randn(2, 3, 4, 4)
    module = lift(read_program(saved(WritesItsInput(), (x.clone(),))))
    kept = x.clone()
    torch.testing.assert_close(module(x), kept.relu().flatten(1) * 2)
    assert torch.equal(x, kept)
    with pytest.raises(ProgramRefused, match="must keep no state"):
        lift(read_program(saved(Counts(), (x,))))


def test_a_program_in_memory_and_in_a_file_give_one_module() -> None:
    model, x = vit(), torch.randn(2, 3, 32, 32)
    program = torch.export.export(model, (x,), strict=False)
    file = io.BytesIO()
    torch.export.save(program, file)
    one, other = lift(program_of(program)), lift(read_program(file.getvalue()))
    assert [str(node.target) for node in one.graph.nodes] == [str(node.target) for node in other.graph.nodes]
    assert torch.equal(one(x), other(x))


def test_exported_takes_a_module_that_branches_on_shapes() -> None:
    class Pads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small()

        def forward(self, image: Tensor) -> dict[str, Tensor]:
            height = image.shape[-2]
            padded = F.pad(image, (0, 0, 0, 8 - height % 8)) if height % 8 else image
            return {"logits": self.net(padded)}

    model, x = Pads().eval(), torch.randn(3, 3, 12, 8)
    found = exported(model, x[:2])
    assert isinstance(found, fx.GraphModule)
    torch.testing.assert_close(found(x), model(x))
    torch.testing.assert_close(exported(model, {"image": x[:2]})(x), model(x))


class ReadsValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


def test_exported_names_the_reason() -> None:
    with pytest.raises(CaptureError, match=r"torch.export cannot trace ReadsValues \(.+\); change the line"):
        exported(ReadsValues(), torch.randn(2, 3, 4, 4))
    assert not issubclass(CaptureError, LoadError)
