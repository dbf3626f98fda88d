"""Native int8 convolutions: exact for random shapes, and the same bits with any number of threads."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from conv_models import Layer, add_convolution, integers, one_convolution, with_native_convolutions
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_models import SCALE, ZERO, Graph, native_operators, run, session
from native_models import built_library
from numpy.typing import NDArray
from onnx import numpy_helper


@pytest.fixture(scope="session")
def library() -> Path:
    return built_library()


def images(layer: Layer, size: tuple[int, int], count: int = 2) -> NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal((count, layer.channels, *size)).astype(np.float32)


def expected(file: onnx.ModelProto, sums: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns the exact results in steps of the u8 result: input and result have the same scale."""
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in file.graph.initializer}
    [scales] = [array for name, array in stored.items() if name.endswith(".scale") and array.ndim == 1]
    return sums * scales.astype(np.float64)[:, None, None]


LAYERS = st.builds(
    Layer,
    channels=st.sampled_from([1, 3, 8, 16, 24, 40, 64, 80, 128]),
    rows=st.sampled_from([1, 7, 16, 24, 64, 72]),
    kernel=st.sampled_from([(1, 1), (3, 3), (1, 7), (2, 3), (5, 5)]),
    strides=st.sampled_from([(1, 1), (2, 2), (1, 3)]),
    pads=st.sampled_from([(0, 0, 0, 0), (1, 1, 1, 1), (0, 2, 3, 1)]),
    dilations=st.sampled_from([(1, 1), (2, 2), (2, 1)]),
    keep=st.sampled_from([2, 4, 8, 12, 16]),
    sharing=st.sampled_from([1, 2, 4]),
    largest=st.sampled_from([31, 127]),
)


@settings(max_examples=60, deadline=None)
@given(layer=LAYERS, size=st.tuples(st.integers(9, 14), st.integers(13, 17)), seed=st.integers(0, 99))
def test_sums_are_those_of_torch_in_float64(library: Path, layer: Layer, size: tuple[int, int], seed: int) -> None:
    """The result may be one step off where the float64 number lies in the middle between two steps."""
    file, weight = one_convolution(layer, seed)
    x = images(layer, size)
    changed = with_native_convolutions(file, x)
    assert native_operators(changed) == {"NMConvInt8": 1}
    [ours] = run(changed, x, library)
    steps = expected(file, integers(x, weight, layer))
    assert ours.shape == steps.shape
    exact = np.clip(steps + ZERO, 0, 255)
    assert np.abs(ours - exact).max() <= 0.5 + 1e-3  # float32 arithmetic on numbers up to 2^17


@pytest.mark.parametrize("rectifier", ["", "Relu", "Clip"])
@pytest.mark.parametrize("keep", [4, 8, 16])
def test_results_are_those_of_the_file_and_of_the_fallback(library: Path, rectifier: str, keep: int) -> None:
    layer = Layer(32, 24, keep=keep)
    file, _ = one_convolution(layer, 0, rectifier)
    x = images(layer, (8, 9))
    changed = with_native_convolutions(file, x)
    onnx.checker.check_model(changed, full_check=True)
    [ours], [fallback], [theirs] = run(changed, x, library), run(changed, x), run(file, x)
    assert np.array_equal(fallback, theirs)
    assert np.abs(ours.astype(int) - theirs).max() <= 1
    assert (ours != theirs).mean() < 0.01  # sums in the middle between two steps


@pytest.mark.parametrize("sharing", [1, 4])
@pytest.mark.parametrize("keep", [4, 8, 16])
def test_threads_change_no_bit(library: Path, keep: int, sharing: int) -> None:
    layer = Layer(48, 136, keep=keep, sharing=sharing, largest=127)
    file, _ = one_convolution(layer, 3)
    x = images(layer, (13, 11), 3)
    changed = with_native_convolutions(file, x)
    results = [session(changed, library, threads).run(None, {"x": x})[0] for threads in range(1, 9)]
    assert all(np.array_equal(results[0], result) for result in results[1:])


def block_of(graph: Graph, x: str, channels: int, rows: int, stride: int) -> str:
    """A residual block: the skip branch is a convolution where the shape changes."""
    first, _ = add_convolution(graph, graph.dequantize(x), Layer(channels, rows, strides=(stride, stride), keep=8))
    inner = graph.quantize(graph.op("Relu", [first]))
    second, _ = add_convolution(graph, graph.dequantize(inner), Layer(rows, rows, keep=8))
    branch, skip = graph.dequantize(graph.quantize(second)), x
    if (channels, stride) != (rows, 1):
        layer = Layer(channels, rows, (1, 1), (stride, stride), (0, 0, 0, 0), keep=8)
        skip = graph.quantize(add_convolution(graph, graph.dequantize(x), layer)[0])
    return graph.quantize(graph.op("Relu", [graph.op("Add", [branch, graph.dequantize(skip)])]))


def test_a_whole_residual_network_stays_with_the_channels_last(library: Path) -> None:
    """Only the first and the last tensor are transposed; the pooling before the first convolution works on bytes."""
    graph = Graph(5)
    pooled = graph.op("MaxPool", ["x"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    x = graph.quantize(pooled)
    for channels, rows, stride in ((16, 16, 1), (16, 32, 2), (32, 32, 1)):
        x = block_of(graph, x, channels, rows, stride)
    graph.output(graph.op("GlobalAveragePool", [graph.dequantize(x)]))
    file = graph.file(("n", 16, "h", "w"))
    images = np.random.default_rng(0).standard_normal((2, 16, 23, 21)).astype(np.float32)
    changed = with_native_convolutions(file, images)
    assert native_operators(changed) == {"NMConvInt8": 4, "NMConvInt8Add": 3, "MaxPoolInt8": 1}
    assert sum(node.op_type == "Transpose" for node in changed.graph.node) == 2
    assert not any(node.op_type == "Add" for node in changed.graph.node)
    [ours], [fallback], [theirs] = run(changed, images, library), run(changed, images), run(file, images)
    assert np.array_equal(fallback, theirs)
    assert np.abs(ours - theirs).max() < SCALE / 2
    for batch in (1, 4):
        [other] = run(changed, np.resize(images, (batch, *images.shape[1:])), library)
        assert np.array_equal(other[0], ours[0])


def test_a_residual_of_another_shape_is_added_by_onnx_runtime(library: Path) -> None:
    graph = Graph(7)
    product, _ = add_convolution(graph, graph.dequantize(graph.quantize("x")), Layer(16, 16))
    one = graph.dequantize(graph.quantize(graph.op("ReduceMean", ["x", graph.ints(2, 3)], keepdims=1)))
    total = graph.op("Add", [graph.dequantize(graph.quantize(product)), one])
    graph.output(graph.quantize(total), onnx.TensorProto.UINT8)
    file = graph.file(("n", 16, "h", "w"))
    x = images(Layer(16, 16), (6, 5))
    changed = with_native_convolutions(file, x)
    assert native_operators(changed) == {"NMConvInt8": 1}
    [ours], [theirs] = run(changed, x, library), run(file, x)
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_an_intermediate_result_that_others_read_is_kept(library: Path) -> None:
    graph = Graph(8)
    first, _ = add_convolution(graph, graph.dequantize(graph.quantize("x")), Layer(16, 32))
    middle = graph.quantize(graph.op("Relu", [first]))
    second, _ = add_convolution(graph, graph.dequantize(middle), Layer(32, 16))
    graph.output(graph.quantize(second), onnx.TensorProto.UINT8)
    graph.output(middle, onnx.TensorProto.UINT8)
    file = graph.file(("n", 16, "h", "w"))
    x = images(Layer(16, 32), (6, 5))
    changed = with_native_convolutions(file, x)
    for ours, theirs in zip(run(changed, x, library), run(file, x), strict=True):
        assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_an_empty_batch_and_images_of_another_size(library: Path) -> None:
    layer = Layer(16, 16)
    file, _ = one_convolution(layer, 0)
    changed = session(with_native_convolutions(file, images(layer, (6, 6))), library)
    assert changed.run(None, {"x": np.zeros((0, 16, 4, 4), np.float32)})[0].shape == (0, 16, 4, 4)
    assert changed.run(None, {"x": np.zeros((1, 16, 9, 3), np.float32)})[0].shape == (1, 16, 9, 3)
