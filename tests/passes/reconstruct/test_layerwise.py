"""Layer-wise calibration: the moments equal those of plain forward passes, and the protocol of the generator."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpcompile.analysis.eligibility import eligible
from mpcompile.analysis.layer_interpreter import LayerInterpreter
from mpcompile.data.images import Data, Split
from mpcompile.errors import LoadError, PassError
from mpcompile.frontend.capture import capture
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.ir.quantization import quantizers
from mpcompile.passes import BatchNorm, NMMask
from mpcompile.passes.quantize.placement import insert, sites
from mpcompile.passes.reconstruct.calibration_batches import peak_bytes
from mpcompile.passes.reconstruct.layer_rows import columns
from mpcompile.passes.reconstruct.layerwise import layerwise
from mpcompile.pipeline.pass_manager import Pass, PassManager
from mpcompile.system.memory import memory_limit
from mpcompile.testing import Noise, tiny_cnn, tiny_data, tiny_mlp, tiny_source, tiny_vit

HALF = NM(2, 4)


def eligible_layers(model: Model) -> list[str]:
    return [name for name, reason in eligible(model, HALF).items() if reason is None]


@pytest.mark.parametrize("make", [tiny_mlp, tiny_cnn, tiny_vit])
def test_moments_are_those_of_the_inputs_from_rewritten_layers(make: object) -> None:
    model: Model = make()  # type: ignore[operator]
    images = tiny_data(model, 40).calibration
    pixels = images.first(40)
    names = eligible_layers(model)
    order = []
    for step in layerwise(model, None, images, names):
        assert step.moments is not None
        [name] = step.weight.names
        order.append(name)
        inputs: list[Tensor] = []

        def keep(n: str, layer: nn.Linear | nn.Conv2d, x: Tensor, y: Tensor, name: str = name) -> None:
            if n == name:
                inputs.append(columns(layer, x))  # noqa: B023

        with torch.no_grad():  # an independent run of the model with the layers rewritten so far
            LayerInterpreter(model.graph, keep).run(pixels)
            rows = torch.cat(inputs, 1).double()
            wanted = rows.mT @ rows / rows.shape[1]
            # Products of one batch are float32.
            gram = step.moments.problem(centred=False).gram
            torch.testing.assert_close(gram, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
            step.layer.weight.mul_(0.5)
    assert sorted(order) == sorted(names)


def hooks_of(model: Model) -> int:
    return sum(len(module._forward_hooks) for module in model.graph.modules())


def test_nothing_runs_before_the_first_step() -> None:
    model = tiny_mlp()
    steps = layerwise(model, None, tiny_data(model, 16).calibration, ["no such layer"])
    assert hooks_of(model) == 0
    with pytest.raises(AttributeError):
        next(steps)


@pytest.mark.parametrize("leave", ["break", "exception", "close"])
def test_leaving_the_loop_early_removes_the_hooks_and_keeps_gradients_on(leave: str) -> None:
    model = tiny_vit()
    dense = tiny_vit().graph
    steps = layerwise(model, dense, tiny_data(model, 16).calibration, eligible_layers(model))
    next(steps)
    assert hooks_of(model) > 0
    assert torch.is_grad_enabled()  # the generator does not change the caller's gradient mode
    if leave == "close":
        steps.close()
    elif leave == "break":
        for _ in steps:
            break
        del steps
    else:
        with pytest.raises(RuntimeError, match="the caller failed"):
            steps.throw(RuntimeError("the caller failed"))
    assert hooks_of(model) == 0
    assert not any(module._forward_hooks for module in dense.modules())


def test_no_moments_are_collected_for_finished_weights() -> None:
    model = tiny_vit()
    names = eligible_layers(model)
    moments = {
        step.weight.names[0]: step.moments
        for step in layerwise(model, None, tiny_data(model, 16).calibration, names, finished=names[:2])
    }
    assert [name for name in names if moments[name] is None] == names[:2]


def test_refits_are_closer_to_the_dense_model_than_masks_alone() -> None:
    model = tiny_vit()
    data = tiny_data(model, 32)
    before = model(data.calibration.first(32))
    result, _ = PassManager([NMMask(HALF)]).run(model, data)
    plain, _ = PassManager([NMMask(HALF, "magnitude", "none")]).run(model, data)
    at_once, _ = PassManager([NMMask(HALF, sequential=False)]).run(model, data)
    own, _ = PassManager([NMMask(HALF, refit="layer")]).run(model, data)

    def error(other: Model) -> float:
        return float((other(data.calibration.first(32)) - before).square().mean())

    assert error(result) < error(own) < 0.2 * error(plain)
    assert error(at_once) < 0.2 * error(plain)


def test_the_norm_after_a_convolution_without_bias_absorbs_the_mean_shift() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 32, 1, bias=False)
            self.norm, self.head = nn.BatchNorm2d(32), nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.norm(self.conv(F.relu(self.stem(x)))))
            return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]

    model = capture(Normed().eval(), tiny_source())
    data = tiny_data(model, 48)
    result, _ = PassManager([NMMask(NM(1, 4))]).run(model, data)
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> object:
        return lambda module, args, output: seen.update({name: output})

    with torch.no_grad():
        for side, graph in (("dense", model.graph), ("masked", result.graph)):
            graph.get_submodule("norm").register_forward_hook(keep(side))  # type: ignore[arg-type]
            graph(data.calibration.first(48))
    means = [seen[side].mean((0, 2, 3)) for side in ("dense", "masked")]
    torch.testing.assert_close(means[0], means[1], rtol=1e-4, atol=1e-5)


def test_a_reused_weight_gets_one_mask_from_all_its_inputs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body, self.head = nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 4)
            self.tied = nn.Linear(32, 32)
            self.tied.weight = self.body.weight

        def forward(self, x: Tensor) -> Tensor:
            x = F.gelu(self.body(F.gelu(self.stem(x.flatten(1)))))
            return self.head(F.gelu(self.tied(F.gelu(self.body(x)))))  # type: ignore[no-any-return]

    model = capture(Twice(), tiny_source())
    data = tiny_data(model, 32)
    result, _ = PassManager([NMMask(HALF)]).run(model, data)
    assert torch.equal(result.plan["body"].mask, result.plan["tied"].mask)  # type: ignore[arg-type]
    assert result.layer("body").weight is result.layer("tied").weight
    assert torch.equal(result.layer("body").bias, model.layer("body").bias)  # type: ignore[arg-type]


def test_beit_which_fetches_its_weights_is_calibrated() -> None:
    from timm.models.beit import Beit

    beit = Beit(img_size=16, patch_size=4, in_chans=1, num_classes=5, embed_dim=32, depth=2, num_heads=2)
    model = capture(beit.eval(), tiny_source((1, 16, 16)))
    data = tiny_data(model, 32)
    result, _ = PassManager([NMMask(HALF)]).run(model, data)
    plain, _ = PassManager([NMMask(HALF, "magnitude", "none")]).run(model, data)
    wanted = model(data.calibration.first(32))
    errors = [float((m(data.calibration.first(32)) - wanted).square().mean()) for m in (result, plain)]
    assert result.plan["blocks.0.attn.qkv"].relative_error is not None
    assert errors[0] < errors[1]


def test_an_image_that_is_not_finite_is_named() -> None:
    model = tiny_mlp()

    class Bad(Noise):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            image, label = super().__getitem__(index)
            return image * float("nan") if index == 21 else image, label

    images = Split(Bad((1, 8, 8), 32), tuple(range(32)), labelled=True)
    with pytest.raises(LoadError, match="calibration image 21 holds numbers that are not finite"):
        PassManager([NMMask(HALF)]).run(model, Data(images))


def test_identical_images_give_finite_outputs() -> None:
    model = tiny_cnn()
    images = Split(Noise((1, 8, 8), 1), (0,) * 20, labelled=True)
    result, _ = PassManager([NMMask(HALF)]).run(model, Data(images))
    assert result(model.example).isfinite().all()


@pytest.mark.parametrize("make", [tiny_mlp, tiny_cnn, tiny_vit])
def test_activations_in_files_give_the_same_bits(make: object, tmp_path: Path) -> None:
    model: Model = make()  # type: ignore[operator]
    passes: list[Pass] = [NMMask(HALF), BatchNorm()]
    in_memory, _ = PassManager(passes).run(model, tiny_data(model))
    with memory_limit(1, tmp_path):
        in_files, _ = PassManager(passes).run(model, tiny_data(model))
    assert not list(tmp_path.iterdir())  # removed at the end
    for name, value in in_memory.graph.state_dict().items():
        assert torch.equal(value, in_files.graph.state_dict()[name])


def test_no_file_is_left_after_an_error(tmp_path: Path) -> None:
    model = tiny_vit()
    with memory_limit(1, tmp_path):
        steps = layerwise(model, None, tiny_data(model).calibration, eligible_layers(model))
        next(steps)
        assert list(tmp_path.glob("activations-*/*"))
        with pytest.raises(RuntimeError, match="the caller failed"):
            steps.throw(RuntimeError("the caller failed"))
    assert not list(tmp_path.iterdir())


def test_peak_bytes_are_those_of_the_activations_alive_at_one_node() -> None:
    model = tiny_mlp()
    # At the largest node, the 64 pixels and their flattened copy.
    assert peak_bytes(model) == 4 * (64 + 64)


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (NMMask(HALF, "wanda"), "the criterion wanda needs calibration images; give --data"),
        (NMMask(HALF, refit="model"), "the refit to the model needs calibration images"),
    ],
)
def test_missing_calibration_images_are_refused(step: NMMask, text: str) -> None:
    with pytest.raises(PassError, match=text):
        PassManager([step]).run(tiny_mlp(), Data())


def test_the_given_model_is_not_changed() -> None:
    model = tiny_cnn()
    data = tiny_data(model, 16)
    before = replace(model, graph=model.graph)(model.example).clone()
    PassManager([NMMask(HALF)]).run(model, data)
    assert torch.equal(model(model.example), before)


@pytest.mark.parametrize("make", [tiny_mlp, tiny_cnn, tiny_vit])
def test_quantizers_are_calibrated_in_order_on_inputs_from_rewritten_layers(make: object) -> None:
    model: Model = make()  # type: ignore[operator]
    images = tiny_data(model, 40).calibration
    names = eligible_layers(model)
    dense = copy.deepcopy(model.graph)
    places = sites(model, names, "convolutions")
    wanted = insert(model.graph, places, "u8")
    insert(dense, places, "u8")
    order: list[str] = []
    sampled: dict[str, Tensor] = {}

    def calibrate(name: str, batches: Sequence[Tensor]) -> None:
        order.append(name)
        sampled[name] = torch.cat([*batches])
        quantizers(model.graph)[name].set_range(float(sampled[name].min()), float(sampled[name].max()))

    for step in layerwise(model, dense, images, names, calibrate=calibrate):
        with torch.no_grad():
            step.layer.weight.mul_(0.5)
    assert order == wanted  # each once
    seen: dict[str, Tensor] = {}
    for name, module in quantizers(model.graph).items():
        module.register_forward_hook(lambda module, args, output, name=name: seen.update({name: args[0]}))
    with torch.no_grad():
        model.graph(images.first(40))
    for name in wanted:
        # Sums over another batch size: a value at the edge of a step may fall to the other side.
        assert float((sampled[name] - seen[name]).abs().max()) <= 0.02 * float(seen[name].abs().max())
        assert not quantizers(dense)[name].calibrated


def test_quantizers_are_left_alone_without_calibrate() -> None:
    model = tiny_mlp()
    insert(model.graph, sites(model, ["hidden"], "convolutions"), "u8")
    for _ in layerwise(model, None, tiny_data(model, 16).calibration, ["hidden"]):
        pass
    assert not any(module.calibrated for module in quantizers(model.graph).values())


def test_an_error_while_calibrating_removes_the_hooks() -> None:
    model = tiny_mlp()
    insert(model.graph, sites(model, ["hidden"], "convolutions"), "u8")

    def calibrate(name: str, batches: Sequence[Tensor]) -> None:
        raise PassError("no range")

    with pytest.raises(PassError, match="no range"):
        next(layerwise(model, None, tiny_data(model, 16).calibration, ["hidden"], calibrate=calibrate))
    assert hooks_of(model) == 0
