"""8-bit files: they compute what the quantised graph computes, and store weights in 8 bits with zero as zero."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from quantized_models import LANES, normalized, quantised_by_hand

from mpcompile.export.mask_check import file_weights
from mpcompile.export.onnx_export import Lowered, lower
from mpcompile.export.quantized_weights import quantized_weights
from mpcompile.ir.model import Model
from mpcompile.ir.parity import require_parity
from mpcompile.ir.pattern import NM
from mpcompile.ir.quantization import ActivationType
from mpcompile.passes import NMMask
from mpcompile.passes.quantize.quantize import Quantize
from mpcompile.pipeline.pass_manager import Pass, PassManager
from mpcompile.runtimes.ort.unrounded import require_unrounded_parity
from mpcompile.testing import tiny_cnn, tiny_data, tiny_mlp, tiny_vit

MODELS = {"mlp": tiny_mlp, "cnn": tiny_cnn, "normalized": normalized, "vit": tiny_vit}


def quantised(model: Model, masks: bool = True, activations: str = "u8", **options: object) -> Model:
    steps: list[Pass] = [NMMask(NM(2, 4))] if masks else []
    steps.append(Quantize(activations=activations, observer="min-max", lanes=LANES, **options))  # type: ignore[arg-type]
    return PassManager(steps).run(model, tiny_data(model))[0]


def outputs(path: Path, images: torch.Tensor, optimised: bool = True) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"images": images.numpy()})[0]
    return result


def dequantised(file: onnx.ModelProto) -> dict[str, np.ndarray]:
    """The float weight of each 8-bit weight, by layer, with the output channels first."""
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in file.graph.initializer}
    steps = {node.input[0]: node for node in file.graph.node if node.op_type == "DequantizeLinear"}
    found = {}
    for row in quantized_weights(file):
        scale = stored[steps[row.initializer].input[1]]
        values = np.moveaxis(stored[row.initializer].astype(np.float64), row.axis, -1) * scale
        for layer in row.layers:
            found[layer] = np.moveaxis(values, -1, 0)
    return found


@pytest.fixture(scope="module", params=MODELS)
def lowered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    model = quantised(MODELS[request.param]())
    return lower(model, tmp_path_factory.mktemp("int8") / f"{request.param}.onnx", precision="int8")


@pytest.mark.parametrize("optimised", [True, False])
def test_the_file_computes_what_the_graph_computes(lowered: Lowered, optimised: bool) -> None:
    images = torch.randn(32, 1, 8, 8)
    expected, found = lowered.model(images).numpy(), outputs(lowered.onnx, images, optimised)
    require_parity(expected, found, "int8", "file against graph")
    # Most images cross no rounding boundary. The rest differ by half a step of 32-bit biases.
    assert np.median(np.abs(found - expected).max(1)) < 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["s8", "fp8"])
@pytest.mark.parametrize("build", [tiny_mlp, tiny_vit, normalized])
def test_signed_files_compute_what_the_graph_computes(
    build: Callable[[], Model], kind: ActivationType, tmp_path: Path
) -> None:
    model = build()
    layers = {"mlp.fc1", "mlp.fc2", "attn.qkv", "attn.proj", "hidden", "a", "b"}
    names = [name for name, _ in model.layers() if any(name == end or name.endswith(f".{end}") for end in layers)]
    lowered = lower(
        quantised_by_hand(model, names, kind), tmp_path / "m.onnx", precision="fp8" if kind == "fp8" else "int8"
    )
    assert lowered.opset == 20
    file, images = onnx.load(lowered.onnx), torch.randn(16, 1, 8, 8)
    stored = {tensor.name: tensor.data_type for tensor in file.graph.initializer}
    expected_type = TensorProto.FLOAT8E4M3FN if kind == "fp8" else TensorProto.INT8
    assert {stored[row.initializer] for row in quantized_weights(file)} == {expected_type}
    assert TensorProto.INT32 not in stored.values()  # TensorRT adds biases in floating point
    expected, found = lowered.model(images).numpy(), outputs(lowered.onnx, images, optimised=False)
    require_parity(expected, found, lowered.precision, "file against graph")
    assert require_unrounded_parity(lowered, images.numpy()) < 1e-5  # float32 sums; no bias is rounded
    if kind == "s8":
        require_parity(expected, outputs(lowered.onnx, images), "int8", "with 8-bit kernels")


def test_openvino_computes_the_same(lowered: Lowered) -> None:
    openvino = pytest.importorskip("openvino")
    images = torch.randn(16, 1, 8, 8)
    compiled = openvino.Core().compile_model(lowered.onnx, "CPU")
    require_parity(lowered.model(images).numpy(), compiled(images.numpy())[0], "int8", "OpenVINO against graph")


def test_a_dense_model_is_written_in_int8(tmp_path: Path) -> None:
    model = quantised(tiny_vit(), masks=False)
    lowered = lower(model, tmp_path / "m.onnx", precision="int8")
    assert lowered.masks == ()
    assert len(quantized_weights(onnx.load(lowered.onnx))) == len(model.scales()) == 8
    images = torch.randn(8, 1, 8, 8)
    require_parity(model(images).numpy(), outputs(lowered.onnx, images), "int8", "file against graph")


def test_every_quantised_layer_is_stored_in_8_bits_with_a_zero_point_of_0(lowered: Lowered) -> None:
    file = onnx.load(lowered.onnx)
    assert lowered.precision == "int8"
    assert {p.key: p.value for p in file.metadata_props}["mpcompile.precision"] == "int8"
    assert next(entry.version for entry in file.opset_import if entry.domain == "") == 21
    rows = quantized_weights(file)
    assert {layer for row in rows for layer in row.layers} == set(lowered.model.scales())
    stored = {tensor.name: tensor for tensor in file.graph.initializer}
    steps = {node.input[0]: node for node in file.graph.node if node.op_type == "DequantizeLinear"}
    for row in rows:
        assert stored[row.initializer].data_type == TensorProto.INT8
        step = steps[row.initializer]
        assert not numpy_helper.to_array(stored[step.input[2]]).any()
        assert next(a.i for a in step.attribute if a.name == "axis") == row.axis
        scale = numpy_helper.to_array(stored[step.input[1]])
        assert scale.shape == (stored[row.initializer].dims[row.axis],)
        assert (scale > 0).all()


def test_zero_stays_zero_and_masks_are_proven_on_integers(lowered: Lowered) -> None:
    file = onnx.load(lowered.onnx)
    by_node = {weight.node: weight for weight in file_weights(file)}
    masks = lowered.model.masks()
    assert {row.layer for row in lowered.masks} == set(masks)
    for row in quantized_weights(file):
        for layer in set(row.layers) & set(masks):
            weight = by_node[row.nodes[0]].values
            assert weight.dtype == np.int8
            assert not weight[~masks[layer].numpy()].any()


def test_integers_are_those_of_the_graph(lowered: Lowered) -> None:
    """Without batch normalization also the scales are."""
    state, by_node = lowered.model.graph.state_dict(), {w.node: w for w in file_weights(onnx.load(lowered.onnx))}
    for row in quantized_weights(onnx.load(lowered.onnx)):
        layer = row.layers[0]
        scale = lowered.model.scales()[layer].double().reshape(-1, *[1] * (state[f"{layer}.weight"].ndim - 1))
        expected = (state[f"{layer}.weight"].double() / scale).round().numpy()
        found = by_node[row.nodes[0]].values.astype(np.float64)
        axes = tuple(range(1, found.ndim))
        # Rows that batch normalization multiplies by a negative number are negated, by zero are zero.
        factor = np.sign((found * expected).sum(axes, keepdims=True))
        assert np.array_equal(found, factor * expected)
        if "norm1" not in dict(lowered.model.graph.named_modules()):
            assert np.array_equal(found, expected)


def test_factors_of_batch_normalization_are_in_the_scales(tmp_path: Path) -> None:
    model = quantised(normalized())
    file = onnx.load(lower(model, tmp_path / "m.onnx", precision="int8").onnx)
    found, state = dequantised(file), model.graph.state_dict()
    for layer, norm in (("a", "norm1"), ("b", "norm2")):
        factor = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + 1e-5).sqrt()
        expected = (state[f"{layer}.weight"] * factor[:, None, None, None]).numpy()
        assert (factor < 0).any()
        # float32 rounds the factor and the product
        assert np.abs(found[layer] - expected).max() < 1e-6 * np.abs(expected).max()
    assert not found["b"][1].any()
    assert (found["b"][0] != 0).any()
