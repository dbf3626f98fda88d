"""Biases of 8-bit files: 32-bit integers where ONNX Runtime computes a Gemm, float32 after a MatMul that it keeps."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from quantized_models import LARGEST, quantised_by_hand
from torch import nn

from mpcompile.export.eight_bit_ends import ends_of
from mpcompile.export.onnx_export import Lowered, lower
from mpcompile.export.quantized_weights import quantized_weights
from mpcompile.frontend.capture import capture
from mpcompile.ir.model import Model
from mpcompile.ir.parity import require_parity
from mpcompile.ir.quantization import ActivationType
from mpcompile.runtimes.native import int8_products
from mpcompile.runtimes.ort.int8_coverage import int8_coverage
from mpcompile.runtimes.ort.unrounded import require_unrounded_parity
from mpcompile.testing import tiny_source, tiny_vit

VIT = [f"blocks.{block}.{layer}" for block in (0, 1) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
BATCH = 2
STEPS = 127 / LARGEST["u8"]  # the step of a weight, in those of a largest integer of 127


def vit_with_biases() -> Model:
    """The tiny ViT with biases that are not 0, as timm initialises them."""
    model = tiny_vit()
    torch.manual_seed(0)
    with torch.no_grad():
        for name in VIT:
            nn.init.normal_(dict(model.graph.named_parameters())[f"{name}.bias"], std=0.1)
    return model


def written(path: Path, batch: int | None, kind: ActivationType = "u8") -> Lowered:
    return lower(quantised_by_hand(vit_with_biases(), VIT, kind), path, precision="int8", batch=batch)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[int | None, Lowered]:
    folder = tmp_path_factory.mktemp("bias")
    return {batch: written(folder / f"{batch}.onnx", batch) for batch in (None, BATCH)}


def types(file: onnx.ModelProto) -> list[int]:
    return [tensor.data_type for tensor in file.graph.initializer]


def outputs(lowered: Lowered, images: np.ndarray) -> np.ndarray:
    """The outputs on all images, in batches of BATCH."""
    session = onnxruntime.InferenceSession(lowered.onnx, providers=["CPUExecutionProvider"])
    parts = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
    return np.concatenate([session.run(None, {"images": part})[0] for part in parts])


def test_a_fixed_batch_stores_each_bias_within_half_a_step(files: dict[int | None, Lowered]) -> None:
    file = onnx.load(files[BATCH].onnx)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in file.graph.initializer}
    makers = {node.output[0]: node for node in file.graph.node}
    products = {node.name: node for node in file.graph.node if node.op_type == "MatMul"}
    for row in quantized_weights(file):
        [name], [layer] = row.nodes, row.layers
        x, w = (makers[value] for value in products[name].input)
        [add] = [node for node in file.graph.node if products[name].output[0] in node.input]
        bias = makers[next(value for value in add.input if value != products[name].output[0])]
        assert (row.op, add.op_type, bias.op_type) == ("MatMul", "Add", "DequantizeLinear")
        integers, scale = stored[bias.input[0]], stored[bias.input[1]]
        assert integers.dtype == np.int32
        assert bias.input[0] == f"{layer}.bias"
        assert np.allclose(scale, stored[x.input[1]].astype(np.float64) * stored[w.input[1]], rtol=1e-6, atol=0)
        expected = files[BATCH].model.graph.state_dict()[f"{layer}.bias"].double().numpy()
        # Beyond half a step, float32 rounds the scale: up to 2^-24 of the bias.
        assert (
            np.abs(integers * scale.astype(np.float64) - expected) <= 0.5 * scale + 2.0**-23 * np.abs(expected)
        ).all()


def test_a_dynamic_batch_keeps_biases_in_float32(files: dict[int | None, Lowered]) -> None:
    """ONNX Runtime keeps the MatMul there, runs it in 8 bits, and would dequantise an int32 bias in every run."""
    assert TensorProto.INT32 not in types(onnx.load(files[None].onnx))


def test_signed_activations_keep_biases_in_float32(tmp_path: Path) -> None:
    """TensorRT's DequantizeLinear does not read int32."""
    assert TensorProto.INT32 not in types(onnx.load(written(tmp_path / "m.onnx", BATCH, "s8").onnx))


def test_both_batches_compute_the_same(files: dict[int | None, Lowered]) -> None:
    images = np.random.default_rng(0).standard_normal((64, 1, 8, 8)).astype(np.float32)
    dynamic, fixed = (outputs(files[batch], images) for batch in (None, BATCH))
    shift = np.abs(fixed - dynamic).max(1) / np.abs(dynamic).max()
    # A bias moves by at most half a step of its grid, input scale × weight scale: about 1 / 2^15 of what the layer
    # computes with 8-bit inputs and weights. That is all if no activation crosses a rounding boundary; with twice the
    # step, twice as many do.
    assert (shift < 1e-4 * STEPS).sum() > len(images) / (3 if STEPS == 1 else 8)
    # Where some do, each changes by a step, 1 / 255 of its range.
    assert shift.max() < 0.03


def test_the_fixed_batch_is_the_graph_without_rounding(files: dict[int | None, Lowered]) -> None:
    # Half a step of each bias, as above.
    assert require_unrounded_parity(files[BATCH], torch.randn(BATCH, 1, 8, 8).numpy()) < 1e-4 * STEPS


def test_a_bias_of_integers_belongs_to_the_product(files: dict[int | None, Lowered]) -> None:
    found = {batch: ends_of(onnx.load(lowered.onnx), ("Gelu",)) for batch, lowered in files.items()}
    for batch, ends in found.items():
        rows = quantized_weights(onnx.load(files[batch].onnx))
        inner = [ends[row.nodes[0]] for row in rows if row.layers[0].endswith("fc1")]
        assert [(end.reads, end.returns) for end in inner] == [(None, None)] * 2  # fc2 reads 8 bits behind Gelu


def test_the_native_operators_take_biases_of_integers(files: dict[int | None, Lowered]) -> None:
    fixed, dynamic = (int8_products.find(onnx.load(files[batch].onnx)) for batch in (BATCH, None))
    assert len(fixed) == len(dynamic) == len(VIT)
    for integers, floats in zip(fixed, dynamic, strict=True):
        step = integers.x_quantization.scale * integers.scale
        assert np.abs(floats.bias).max() > 0
        assert (np.abs(integers.bias - floats.bias) <= 0.501 * step).all()


class Added(nn.Module):
    """A linear layer without bias on three axes, with an addition after it."""

    def __init__(self, added: str) -> None:
        super().__init__()
        self.stem, self.a, self.head = nn.Linear(8, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 10)
        self.added, self.free, self.one = added, nn.Parameter(torch.randn(16)), nn.Parameter(torch.randn(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x.squeeze(1))
        y = self.a(x)
        if self.added == "one number for each channel":
            y = y + self.free
        elif self.added == "one number":
            y = y + self.one
        elif self.added == "the input":
            y = y + x
        elif self.added == "to one of two readers":
            y = y + self.free + y.relu()
        return self.head(y.mean(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("added", "integers", "kernel"),
    [
        ("one number for each channel", 1, "QGemm"),
        ("one number", 0, "MatMulIntegerToFloat"),
        ("the input", 0, "MatMulIntegerToFloat"),
        ("to one of two readers", 0, "MatMulIntegerToFloat"),
        ("nothing", 0, "MatMulIntegerToFloat"),
    ],
)
def test_only_what_onnx_runtime_fuses_is_a_bias(added: str, integers: int, kernel: str, tmp_path: Path) -> None:
    model = quantised_by_hand(capture(Added(added).eval(), tiny_source()), ["a"])
    lowered = lower(model, tmp_path / "m.onnx", precision="int8", batch=BATCH)
    assert types(onnx.load(lowered.onnx)).count(TensorProto.INT32) == integers
    [row] = int8_coverage(lowered.onnx, model.example.numpy(), 1)
    assert (row.in_8_bits, row.kernel) == (True, kernel)
    require_unrounded_parity(lowered, torch.randn(BATCH, 1, 8, 8).numpy())


@pytest.mark.parametrize("kind", ["u8", "s8"])
def test_a_channel_of_nearly_no_weight_keeps_its_bias(kind: ActivationType, tmp_path: Path) -> None:
    """Its bias has more than 2^31 steps. ONNX Runtime stores a float bias before an 8-bit output in 32 bits itself."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Flatten(), nn.Linear(128, 10))
    model = capture(layers.eval(), tiny_source())
    with torch.no_grad():
        model.layer("1").weight[3] *= 2.0**-30
        dict(model.graph.named_parameters())["1.bias"][3] = 3.0
    lowered = lower(quantised_by_hand(model, ["1", "2"], kind), tmp_path / "m.onnx", precision="int8", batch=BATCH)
    images = torch.randn(BATCH, 1, 8, 8)
    assert require_unrounded_parity(lowered, images.numpy()) < 1e-3
    require_parity(lowered.model(images).numpy(), outputs(lowered, images.numpy()), "int8", "ONNX Runtime")
