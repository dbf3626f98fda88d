"""Which quantised layers ONNX Runtime runs in 8 bits: those it should, and for each other one the reason."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from quantized_models import normalized, quantised_by_hand
from torch import nn

from mpcompile.errors import BuildError
from mpcompile.export.onnx_export import Lowered, lower
from mpcompile.frontend.capture import capture
from mpcompile.ir.model import Model
from mpcompile.measure.quantized_layer import QuantizedLayer, tally_8_bit
from mpcompile.passes.quantize.quantize import Quantize
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.runtimes import Build, OnnxRuntime, OnnxRuntimeCuda, ReportsQuantizedLayers
from mpcompile.runtimes.ort.int8_coverage import UNKNOWN, int8_coverage
from mpcompile.runtimes.ort.session import cpu_engine, fast_engine
from mpcompile.testing import tiny_cnn, tiny_data, tiny_mlp, tiny_source, tiny_vit

VIT = [f"blocks.{block}.{layer}" for block in (0, 1) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


def rows_of(lowered: Lowered) -> dict[str, QuantizedLayer]:
    """One row for each quantised layer, on ONNX Runtime's own kernels."""
    engine = OnnxRuntime().build(lowered, Build(threads=1, sparse=False))
    assert isinstance(engine, ReportsQuantizedLayers)
    return {row.layer: row for row in engine.quantised_layers(lowered.model.example[:2].numpy())}


def test_layers_of_a_vit_run_in_8_bits(tmp_path: Path) -> None:
    rows = rows_of(lower(quantised_by_hand(tiny_vit(), VIT), tmp_path / "m.onnx", precision="int8"))
    assert list(rows) == VIT
    for row in rows.values():
        assert (row.in_8_bits, row.kernel, row.reason, row.op) == (True, "MatMulIntegerToFloat", None, "MatMul")
        assert row.ms is not None
        assert row.ms > 0
    assert tally_8_bit(tuple(rows.values())) == "8 of 8 quantised layers ran on 8-bit kernels"


def test_layers_of_a_vit_run_in_8_bits_with_a_fixed_batch(tmp_path: Path) -> None:
    """ONNX Runtime turns MatMul and Add into a Gemm there, which needs an int32 bias to run in 8 bits."""
    rows = rows_of(lower(quantised_by_hand(tiny_vit(), VIT), tmp_path / "m.onnx", precision="int8", batch=2))
    assert list(rows) == VIT
    assert {(row.in_8_bits, row.kernel, row.reason, row.op) for row in rows.values()} == {
        (True, "QGemm", None, "MatMul")
    }
    assert all(row.ms for row in rows.values())


def test_a_float_bias_with_a_fixed_batch_is_told(tmp_path: Path) -> None:
    model = quantised_by_hand(tiny_vit(), VIT, "s8")  # whose biases stay in float32, for TensorRT
    rows = rows_of(lower(model, tmp_path / "m.onnx", precision="int8", batch=2))
    reason = "the bias is float32, and its 8-bit Gemm adds 32-bit integers"
    assert {(row.in_8_bits, row.kernel, row.reason) for row in rows.values()} == {(False, "Gemm", reason)}
    assert all(row.ms for row in rows.values())


def test_a_rectifier_after_a_gemm_is_told(tmp_path: Path) -> None:
    layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
    model = quantised_by_hand(capture(layers.eval(), tiny_source()), ["2"])
    [row] = rows_of(lower(model, tmp_path / "m.onnx", precision="int8")).values()
    assert (row.in_8_bits, row.kernel) == (False, "FusedGemm")
    assert str(row.reason).startswith("Relu node_relu comes after it, and ONNX Runtime fuses the two in floating point")


def test_a_gemm_runs_in_8_bits_with_a_float_output(tmp_path: Path) -> None:
    rows = rows_of(lower(quantised_by_hand(tiny_mlp(), ["hidden"]), tmp_path / "m.onnx", precision="int8", batch=4))
    assert (rows["hidden"].in_8_bits, rows["hidden"].kernel) == (True, "QGemm")


@pytest.mark.parametrize("build", [tiny_cnn, normalized])
def test_convolutions_that_the_pass_quantised_run_in_8_bits(build: object, tmp_path: Path) -> None:
    dense: Model = build()  # type: ignore[operator]
    model = PassManager([Quantize(observer="min-max")]).run(dense, tiny_data(dense))[0]
    rows = rows_of(lower(model, tmp_path / "m.onnx", precision="int8"))
    assert set(rows) == set(model.scales())
    assert {(row.in_8_bits, row.kernel, row.reason) for row in rows.values()} == {(True, "QLinearConv", None)}


def test_a_convolution_without_an_8_bit_output_is_told_with_its_reason(tmp_path: Path) -> None:
    rows = rows_of(lower(quantised_by_hand(normalized(), ["a", "b"]), tmp_path / "m.onnx", precision="int8"))
    assert not rows["b"].in_8_bits
    assert rows["b"].reason is not None
    assert rows["b"].reason.startswith("the output is not quantised (Add ")
    assert "1 of 2" in (text := tally_8_bit(tuple(rows.values()))) or "0 of 2" in text
    assert f"b: {rows['b'].reason}" in text


def test_a_layer_without_a_quantised_input_is_told(tmp_path: Path) -> None:
    model = quantised_by_hand(tiny_mlp(), ["hidden"])
    lowered = lower(model, tmp_path / "m.onnx", precision="int8")
    file = onnx.load(lowered.onnx)
    [dequantise] = [n for n in file.graph.node if n.input and n.op_type == "DequantizeLinear" and "val" in n.input[0]]
    [quantise] = [n for n in file.graph.node if n.op_type == "QuantizeLinear"]
    for node in file.graph.node:
        node.input[:] = [quantise.input[0] if name == dequantise.output[0] else name for name in node.input]
    onnx.save(file, lowered.onnx)
    [row] = int8_coverage(lowered.onnx, model.example.numpy(), 1)
    assert (row.in_8_bits, row.kernel) == (False, "Gemm")
    assert row.reason == "the input is not quantised (Gelu node_gelu)"


def test_signed_activations_keep_rectifiers_and_float_biases(tmp_path: Path) -> None:
    dense = tiny_cnn()
    model = PassManager([Quantize(activations="s8", observer="min-max")]).run(dense, tiny_data(dense))[0]
    rows = rows_of(lower(model, tmp_path / "m.onnx", precision="int8"))
    reasons = [row.reason for row in rows.values() if not row.in_8_bits]
    assert any("the bias is float32, and its 8-bit Conv adds 32-bit integers" in str(reason) for reason in reasons)
    assert any("with signed activations it is not dropped" in str(reason) for reason in reasons)
    assert UNKNOWN not in reasons


def test_the_reference_runs_no_8_bit_kernels_and_the_target_does(tmp_path: Path) -> None:
    lowered = lower(quantised_by_hand(tiny_vit(), VIT), tmp_path / "m.onnx", precision="int8")
    reference, fast = cpu_engine(lowered, 1), fast_engine(lowered, 1)
    images = lowered.model.example.numpy()
    assert reference.is_reference
    assert not fast.is_reference
    assert not OnnxRuntime().build(lowered, Build(threads=1)).is_reference
    assert reference.quantised_layers(images) == ()
    assert np.abs(reference(images) - fast(images)).max() < 0.1 * np.abs(reference(images)).max()


def test_a_float_file_has_no_quantised_layers(vit_file: Lowered) -> None:
    assert OnnxRuntime().build(vit_file, Build(threads=1)).quantised_layers(vit_file.model.example.numpy()) == ()
    assert int8_coverage(vit_file.onnx, vit_file.model.example.numpy()) == ()


def test_a_file_that_cannot_run_is_an_error_in_words(tmp_path: Path) -> None:
    lowered = lower(quantised_by_hand(tiny_mlp(), ["hidden"]), tmp_path / "m.onnx", precision="int8")
    with pytest.raises(BuildError, match=r"ONNX Runtime cannot profile m\.onnx: "):
        int8_coverage(lowered.onnx, np.zeros((1, 3, 5, 5), np.float32))


def test_targets_refuse_precisions_that_they_have_no_kernels_for() -> None:
    assert OnnxRuntime().refuses("int8", None) is None
    assert OnnxRuntime().refuses("fp8", None) == "it has no FP8 kernels on a CPU; use int8"
    for precision in ("int8", "fp8"):
        assert "it has no 8-bit kernels" in str(OnnxRuntimeCuda().refuses(precision, None))
