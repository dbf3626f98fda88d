"""8-bit weights and 32-bit biases: shared weights, rows of zeros, sizes, and what is refused."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from quantized_models import LANES, normalized, quantised_by_hand
from torch import nn

from mpcompile.data.images import Data
from mpcompile.errors import BuildError, MaskError, ParityError, UsageError
from mpcompile.export import mask_check
from mpcompile.export import quantized_weights as writer
from mpcompile.export.mask_check import FileWeight, file_weights, verify_masks
from mpcompile.export.onnx_export import Lowered, lower
from mpcompile.export.quantized_weights import quantized_weights
from mpcompile.frontend.capture import capture
from mpcompile.ir.model import Model
from mpcompile.ir.parity import require_parity
from mpcompile.ir.pattern import NM
from mpcompile.ir.quantization import ActivationType, quantizers
from mpcompile.passes import NMMask
from mpcompile.passes.quantize.quantize import Quantize
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.runtimes.ort.unrounded import require_unrounded_parity
from mpcompile.testing import tiny_cnn, tiny_data, tiny_mlp, tiny_source, tiny_vit


def masked(model: Model) -> Model:
    return PassManager([NMMask(NM(2, 4), criterion="magnitude", refit="none")]).run(model, Data())[0]


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    model = quantised_by_hand(masked(tiny_mlp()), ["hidden"])
    return lower(model, tmp_path_factory.mktemp("int8") / "m.onnx", precision="int8")


def changed(lowered: Lowered, name: str, change: Callable[[np.ndarray], np.ndarray]) -> onnx.ModelProto:
    file = onnx.load(lowered.onnx)
    tensor = next(t for t in file.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), name))
    return file


def proven(file: onnx.ModelProto, model: Model) -> None:
    verify_masks(file, model.plan, model.graph.state_dict())


# ---- the mask in 8 bits


def fill_one(values: np.ndarray) -> np.ndarray:
    values[tuple(np.argwhere(values == 0)[0])] = 1
    return values


def test_one_integer_filled_in_is_found(lowered: Lowered) -> None:
    proven(onnx.load(lowered.onnx), lowered.model)
    with pytest.raises(MaskError, match=r"hidden: 1 weights that the mask zeroes are not zero in hidden.weight"):
        proven(changed(lowered, "hidden.weight", fill_one), lowered.model)


def test_a_zero_point_that_moves_zero_is_found(lowered: Lowered) -> None:
    [step] = [n for n in onnx.load(lowered.onnx).graph.node if n.input and n.input[0] == "hidden.weight"]
    with pytest.raises(MaskError, match="weights that the mask zeroes are not zero"):
        proven(changed(lowered, step.input[2], lambda zero: zero + 1), lowered.model)


def test_masks_are_proven_without_the_scales(lowered: Lowered) -> None:
    """An output folder has the masks and the float weights, but no scales of weights."""
    plans = {name: replace(plan, scale=None) for name, plan in lowered.model.plan.items()}
    file = onnx.load(lowered.onnx)
    assert verify_masks(file, plans, lowered.model.graph.state_dict()) == lowered.masks
    with pytest.raises(MaskError, match="hidden: 1 weights that the mask zeroes"):
        verify_masks(changed(lowered, "hidden.weight", fill_one), plans, lowered.model.graph.state_dict())


def test_a_weight_without_name_and_scope_is_found_by_its_integers(lowered: Lowered) -> None:
    file = onnx.load(lowered.onnx)
    del file.metadata_props[:]
    for node in file.graph.node:
        del node.metadata_props[:]
        node.input[:] = ["other" if name == "hidden.weight" else name for name in node.input]
    next(t for t in file.graph.initializer if t.name == "hidden.weight").name = "other"
    proven(file, lowered.model)


# ---- which numbers are stored


class Twice(nn.Module):
    """A layer that is applied twice, to inputs of different scales."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.head = nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.a(self.a(self.stem(x.flatten(1))).relu()))  # type: ignore[no-any-return]


def test_a_weight_that_two_nodes_use_is_stored_once(tmp_path: Path) -> None:
    model = quantised_by_hand(masked(capture(Twice().eval(), tiny_source())), ["a"])
    list(quantizers(model.graph).values())[1].set_range(0.0, 1.0)
    lowered = lower(model, tmp_path / "m.onnx", precision="int8")
    file = onnx.load(lowered.onnx)
    [row] = quantized_weights(file)
    assert (row.layers, row.initializer, len(row.nodes), row.op) == (("a",), "a.weight", 2, "Gemm")
    assert [t.data_type for t in file.graph.initializer].count(TensorProto.INT8) == 2  # the weight and its zero point
    biases = [t for t in file.graph.initializer if t.data_type == TensorProto.INT32]
    assert len(biases) == 2  # one for each input scale
    assert not any(t.name == "a.bias" and t.data_type == TensorProto.FLOAT for t in file.graph.initializer)
    require_unrounded_parity(lowered, model.example.numpy())


def test_rows_of_zeros_keep_their_bias(tmp_path: Path) -> None:
    model = tiny_mlp()
    with torch.no_grad():
        model.layer("hidden").weight[3] = 0
        dict(model.graph.named_parameters())["hidden.bias"][3] = 5.0
    model = quantised_by_hand(model, ["hidden"])
    lowered = lower(model, tmp_path / "m.onnx", precision="int8")
    assert require_unrounded_parity(lowered, model.example.numpy()) < 1e-4
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(lowered.onnx).graph.initializer}
    assert not stored["hidden.weight"][3].any()
    [step] = [n for n in onnx.load(lowered.onnx).graph.node if n.op_type == "DequantizeLinear" and "bias" in n.name]
    assert stored[step.input[0]].dtype == np.int32
    assert abs(stored[step.input[0]][3] * stored[step.input[1]][3] - 5.0) < 1e-5


@pytest.mark.parametrize("build", [tiny_mlp, tiny_cnn])
@pytest.mark.parametrize("kind", ["u8", "s8"])
def test_channels_of_nearly_no_weight_keep_their_bias_in_onnx_runtime(
    build: Callable[[], Model], kind: ActivationType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """ONNX Runtime quantises a float bias by itself, and lets the integers wrap around."""
    model = masked(build())
    layer = "hidden" if build is tiny_mlp else "body"
    with torch.no_grad():
        dict(model.graph.named_parameters())[f"{layer}.bias"][3] = 5.0
    options: dict[str, Any] = {"outputs": "all", "observer": "min-max", "refit": False, "lanes": LANES}
    model = PassManager([Quantize(activations=kind, **options)]).run(model, tiny_data(model, 16))[0]
    plan, factor = model.plan_of(layer), torch.ones(len(model.layer(layer).weight))
    factor[3] = 2.0**-24  # the pass quantize keeps scales large enough for biases; another pass may not
    assert plan.scale is not None
    with torch.no_grad():
        model.layer(layer).weight[3] *= factor[3]
    model = model.with_plan({layer: replace(plan, scale=plan.scale * factor)})
    with caplog.at_level(logging.DEBUG, "mpcompile"):
        lowered = lower(model, tmp_path / "m.onnx", precision="int8")
    assert "the scales of 1 output channels are raised to hold their biases" in caplog.text
    assert require_unrounded_parity(lowered, model.example.numpy()) < 1e-3
    images = model.example.numpy()
    session = onnxruntime.InferenceSession(lowered.onnx, providers=["CPUExecutionProvider"])
    require_parity(model(model.example).numpy(), session.run(None, {"images": images})[0], "int8", "ONNX Runtime")
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(lowered.onnx).graph.initializer}
    graph, scale = model.layer(layer).weight.detach().double(), model.scales()[layer].double()
    integers = (graph / scale.reshape(-1, *[1] * (graph.ndim - 1))).round().numpy()
    others = np.arange(len(integers)) != 3
    assert np.array_equal(stored[f"{layer}.weight"][others], integers[others])
    assert not stored[f"{layer}.weight"][~model.masks()[layer].numpy()].any()


class Wide(nn.Module):
    """Layers of the widths of ViT-B, with few other weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = (
            nn.Linear(i, o) for i, o in ((64, 768), (768, 3072), (3072, 768), (768, 10))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.b(self.a(self.stem(x.flatten(1)).relu()).relu()))  # type: ignore[no-any-return]


def test_the_file_has_at_most_27_percent_of_the_size(tmp_path: Path) -> None:
    model = capture(Wide().eval(), tiny_source())
    full = lower(model, tmp_path / "fp32.onnx").onnx.stat().st_size
    small = lower(quantised_by_hand(model, ["a", "b"]), tmp_path / "int8.onnx", precision="int8").onnx.stat().st_size
    assert small <= 0.27 * full


def test_large_weights_go_beside_the_file(tmp_path: Path) -> None:
    model = quantised_by_hand(masked(tiny_vit()), ["blocks.0.mlp.fc1", "blocks.1.mlp.fc2"])
    lowered = lower(model, tmp_path / "m.onnx", precision="int8", inline_limit_bytes=1000)
    assert (tmp_path / "m.onnx.data").is_file()
    assert len(lowered.masks) == 8
    require_unrounded_parity(lowered, model.example.numpy())


# ---- what is refused


def test_precisions_that_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "m.onnx", quantised_by_hand(tiny_mlp(), ["hidden"])
    with pytest.raises(UsageError, match="the model has no quantised layer, so it cannot be written in int8"):
        lower(tiny_mlp(), path, precision="int8")
    with pytest.raises(UsageError, match="the model is quantised to int8 and cannot be written in fp32; use --prec"):
        lower(model, path)
    with pytest.raises(UsageError, match="the model is quantised to int8 and cannot be written in fp8"):
        lower(model, path, precision="fp8")
    with pytest.raises(UsageError, match="opset 20 has no QuantizeLinear as int8 uses it; int8 needs opset 21 or lat"):
        lower(model, path, precision="int8", opset=20)
    assert not path.exists()


def test_a_weight_off_its_grid_is_refused(tmp_path: Path) -> None:
    model = quantised_by_hand(tiny_mlp(), ["hidden"])
    with torch.no_grad():
        model.layer("hidden").weight[5, 2] *= 1.001
    with pytest.raises(
        BuildError, match=r"hidden: 1 weights are not on their int8 grid \(the first is in output chan"
    ) as e:
        lower(model, tmp_path / "m.onnx", precision="int8")
    assert "channel 5); a pass after quantize changed them, so put quantize after it" in str(e.value)


def test_a_weight_that_the_export_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bent(*arguments: object) -> dict[str, list[FileWeight]]:
        found = original(*arguments)  # type: ignore[arg-type]
        values = found["b"][0].values.copy()
        values[4, 0] *= 1.01
        return {**found, "b": [replace(found["b"][0], values=values)]}

    original = mask_check.match_layers
    monkeypatch.setattr(writer, "match_layers", bent)
    with pytest.raises(BuildError, match=r"b: output channel 4 of its weight in the ONNX file is not on its int8 grid"):
        lower(quantised_by_hand(normalized(), ["a", "b"]), tmp_path / "m.onnx", precision="int8")
    monkeypatch.setattr(writer, "match_layers", lambda *arguments: {"b": []})
    with pytest.raises(BuildError, match="b: its weight was lost in the export"):
        lower(quantised_by_hand(normalized(), ["b"]), tmp_path / "m.onnx", precision="int8")


# ---- file against graph, without rounding


def test_one_wrong_weight_is_found_without_rounding(lowered: Lowered, tmp_path: Path) -> None:
    """A difference that the rounding of activations could cause as well."""

    def bend(values: np.ndarray) -> np.ndarray:
        values[tuple(np.argwhere(values > 60)[0])] -= 50
        return values

    file = changed(lowered, "hidden.weight", bend)
    onnx.save(file, tmp_path / "m.onnx")
    bent = replace(lowered, onnx=tmp_path / "m.onnx")
    assert require_unrounded_parity(lowered, lowered.model.example.numpy()) < 1e-3
    with pytest.raises(ParityError, match="m.onnx: even without the rounding of activations the outputs differ by"):
        require_unrounded_parity(bent, lowered.model.example.numpy())


def test_another_zero_point_is_found(lowered: Lowered, tmp_path: Path) -> None:
    [step] = [n for n in onnx.load(lowered.onnx).graph.node if n.op_type == "QuantizeLinear"]
    onnx.save(changed(lowered, step.input[2], lambda zero: zero + 1), tmp_path / "m.onnx")
    with pytest.raises(ParityError, match="m.onnx: 1 of 1 activations have another scale or zero point in the file"):
        require_unrounded_parity(replace(lowered, onnx=tmp_path / "m.onnx"), lowered.model.example.numpy())


def test_stored_weights_are_read_as_integers(lowered: Lowered) -> None:
    weight = next(w for w in file_weights(onnx.load(lowered.onnx)) if w.initializer == "hidden.weight")
    assert weight.values.dtype == np.dtype(np.int8)
    assert (weight.op, weight.axis) == ("Gemm", 1)
