"""Which convolutions of an int8 file run on the native operator, and the reason for each of the others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conv_models import Layer, one_convolution, with_native_convolutions
from int8_models import native_operators
from kernel_trials import shorten_trials
from native_models import built_library
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from quantized_models import LANES

from mpcompile.data.images import Data
from mpcompile.export.onnx_export import Lowered, lower
from mpcompile.ir.pattern import NM
from mpcompile.passes import NMMask, Quantize
from mpcompile.pipeline.pass_manager import Pass, PassManager
from mpcompile.runtimes import Build, OnnxRuntime, native
from mpcompile.runtimes.native import int8_convolutions, int8_selection
from mpcompile.runtimes.native.int8_microbenchmark import by_columns, skips_zeros
from mpcompile.runtimes.native.int8_selection import accelerate, inspected
from mpcompile.runtimes.native.kernel_selection import Accelerated
from mpcompile.runtimes.ort.native_kernel import NMEngine
from mpcompile.runtimes.ort.session import cpu_engine
from mpcompile.testing import tiny_cnn, tiny_data

native_kernel = pytest.mark.skipif(native.missing() is not None, reason="the native kernel cannot be used here")


@pytest.fixture(scope="session")
def library() -> Path:
    return built_library()


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    """A masked CNN in int8, with a residual, a depthwise and a grouped convolution."""
    model = tiny_cnn()
    data: Data = tiny_data(model, 16)
    passes: list[Pass] = [NMMask(NM(2, 4)), Quantize(observer="min-max", refit=False, lanes=LANES)]
    quantised, _ = PassManager(passes).run(model, data)
    return lower(quantised, tmp_path_factory.mktemp("cnn") / "model.onnx", precision="int8")


def images_of(made: Lowered, batch: int = 2) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((batch, *made.image_shape)).astype(np.float32)


def selected(made: Lowered, library: Path) -> Accelerated:
    return accelerate(onnx.load(made.onnx), made.masks, library, images_of(made), seconds=0.0)


def test_convolutions_are_replaced_and_the_others_have_a_reason(
    monkeypatch: pytest.MonkeyPatch, library: Path, cnn: Lowered
) -> None:
    shorten_trials(monkeypatch, interval=(1.1, 1.2))
    found = selected(cnn, library)
    assert native_operators(found.file) == {"NMConvInt8": 2, "NMConvInt8Add": 1}
    reasons = {choice.layers[0]: choice.reason for choice in found.choices if not choice.native}
    assert reasons == {"grouped": int8_convolutions.GROUPED.format(2)}
    [body] = [choice for choice in found.choices if choice.layers == ("body",)]
    assert (body.shape, body.x, body.skips_zeros) == ((16, 144), (2, 8, 8, 16), True)
    assert body.pattern == "2:4"
    assert "times as fast as ONNX Runtime's" in body.reason


def test_all_convolutions_are_dropped_if_the_whole_file_does_not_gain(
    monkeypatch: pytest.MonkeyPatch, library: Path, cnn: Lowered
) -> None:
    shorten_trials(monkeypatch, interval=(0.99, 1.2))
    found = selected(cnn, library)
    assert found.count == 0
    assert found.file == onnx.load(cnn.onnx)
    assert any("the whole file is not significantly faster" in choice.reason for choice in found.choices)


def test_equal_convolutions_are_measured_once(monkeypatch: pytest.MonkeyPatch, library: Path, cnn: Lowered) -> None:
    shorten_trials(monkeypatch, interval=(1.1, 1.2))
    measured, measure = [], int8_selection.measure_convolution  # type: ignore[attr-defined]

    def counted(*given: Any) -> object:
        measured.append(given[1])
        return measure(*given)

    monkeypatch.setattr(int8_selection, "measure_convolution", counted)
    selected(cnn, library)
    assert measured == [(2, 8, 8, 16), (2, 8, 8, 24), (2, 8, 8, 6)]


@native_kernel
def test_the_engine_runs_and_reports_native_convolutions(monkeypatch: pytest.MonkeyPatch, cnn: Lowered) -> None:
    shorten_trials(monkeypatch, interval=(1.1, 1.2))
    engine, images = OnnxRuntime().build(cnn, Build(1, batches=(2,))), images_of(cnn)
    assert isinstance(engine, NMEngine)
    expected = cpu_engine(cnn, 1)(images)
    assert np.abs(engine(images) - expected).max() < 0.05 * np.abs(expected).max()  # a few steps of 8 bits
    kernels = {row.layer: (row.native, row.kernel) for row in engine.quantised_layers(images)}
    assert kernels["body"] == (True, "NMConvInt8Add")
    assert kernels["grouped"] == (False, "QLinearConv")
    verdicts = {row.layer: (row.chosen, row.kernel) for row in engine.judged((), cnn.masks, images)}
    assert verdicts["body"] == (True, f"NMConvInt8, {native.int8_instruction_set()}")
    assert verdicts["grouped"] == (False, None)


@pytest.mark.parametrize(("keep", "channels", "skips"), [(8, 16, True), (8, 24, True), (12, 32, False), (4, 8, True)])
def test_zeros_are_skipped_also_where_taps_are_padded(keep: int, channels: int, skips: bool) -> None:
    layer = Layer(channels, 16, keep=keep)
    file, _ = one_convolution(layer, 0)
    [found] = inspected(file, np.zeros((2, channels, 8, 8), np.float32)).convolutions
    assert skips_zeros(by_columns(found)) == skips


def node(file: onnx.ModelProto, op: str, index: int = 0) -> onnx.NodeProto:
    found: list[onnx.NodeProto] = [node for node in file.graph.node if node.op_type == op]
    return found[index]


def store(file: onnx.ModelProto, name: str, array: Any) -> None:
    """Replaces an initializer."""
    [tensor] = [tensor for tensor in file.graph.initializer if tensor.name == name]
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(array), name))


def signed_input(file: onnx.ModelProto) -> None:
    store(file, "zero", np.int8(0))
    file.graph.output[0].type.tensor_type.elem_type = TensorProto.INT8


def weight_with_zero_points(file: onnx.ModelProto) -> None:
    store(file, node(file, "DequantizeLinear", 1).input[2], np.arange(16, dtype=np.int8))


def scales_of_input_channels(file: onnx.ModelProto) -> None:
    node(file, "DequantizeLinear", 1).attribute[0].i = 1


def padding_by_name(file: onnx.ModelProto) -> None:
    convolution = node(file, "Conv")
    kept = [attribute for attribute in convolution.attribute if attribute.name not in ("pads", "dilations")]
    del convolution.attribute[:]
    convolution.attribute.extend([*kept, helper.make_attribute("auto_pad", "SAME_UPPER")])


def float_output(file: onnx.ModelProto) -> None:
    del file.graph.node[-1]
    file.graph.output[0].name = node(file, "Conv").output[0]
    file.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT


def computed_bias(file: onnx.ModelProto) -> None:
    file.graph.node.insert(0, helper.make_node("ReduceMean", ["x"], ["computed"], keepdims=0))
    file.graph.node.insert(1, helper.make_node("Expand", ["computed", "rows"], ["bias"]))
    file.graph.initializer.append(numpy_helper.from_array(np.array([16]), "rows"))
    node(file, "Conv").input.append("bias")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (signed_input, int8_convolutions.OTHER_INPUT),
        (weight_with_zero_points, int8_convolutions.OTHER_WEIGHT),
        (scales_of_input_channels, int8_convolutions.OTHER_WEIGHT),
        (padding_by_name, int8_convolutions.OTHER_SHAPE),
        (float_output, int8_convolutions.OTHER_OUTPUT),
        (computed_bias, int8_convolutions.OTHER_BIAS),
    ],
)
def test_what_the_operator_does_not_compute_is_refused(spoil: Callable[[onnx.ModelProto], None], reason: str) -> None:
    file, _ = one_convolution(Layer(16, 16), 0)
    spoil(file)
    onnx.checker.check_model(file, full_check=True)
    x = np.zeros((2, 16, 8, 8), np.float32)
    found = inspected(file, x)
    assert list(found.refused.values()) == [reason]
    assert with_native_convolutions(file, x) is file


def test_more_weights_than_sums_can_hold_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_convolutions, "MOST_COLUMNS", 143)
    file, _ = one_convolution(Layer(16, 16), 0)
    assert list(inspected(file, np.zeros((2, 16, 8, 8), np.float32)).refused.values()) == [int8_convolutions.TOO_LARGE]
