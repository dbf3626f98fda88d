"""The int8 operators in real sessions: any number of threads, batch sizes in any order, and concurrent calls."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from int8_models import Graph, native_operators, rewritten, session
from native_models import built_library
from numpy.typing import NDArray
from onnx import TensorProto
from test_int8_rewrite import TOKENS, WIDTH, Writing, add_attention

Array = NDArray[np.float32]
BATCHES = (1, 7, 2, 40, 1)


@pytest.fixture(scope="session")
def library() -> Path:
    return built_library()


@pytest.fixture(scope="module")
def block() -> onnx.ModelProto:
    """A transformer block with all kinds of operators, for any batch."""
    graph = Graph(0)
    x = graph.op("Neg", ["x"])
    mixed = add_attention(graph, graph.norm(x, WIDTH), Writing("split", "scores", True, "hnn", True))
    x = graph.op("Add", [x, graph.product(graph.dequantize(graph.quantize(mixed)), WIDTH, WIDTH, "matmul bias")])
    u8 = graph.dequantize(graph.quantize(graph.norm(x, WIDTH)))
    inner = graph.op("Gelu", [graph.product(u8, WIDTH, 4 * WIDTH, "matmul bias")])
    y = graph.product(graph.dequantize(graph.quantize(inner)), 4 * WIDTH, WIDTH, "matmul bias", keep=4)
    x = graph.op("Add", [y, x])
    graph.output(x)
    graph.output(graph.quantize(graph.norm(x, WIDTH)), TensorProto.UINT8)
    changed = rewritten(graph.file(("batch", TOKENS, WIDTH)), images(2))
    assert native_operators(changed) == {
        "LayerNormQuantize": 2, "NMGemmInt8": 1, "NMGemmInt8Add": 2, "NMGemmInt8GeluQuantize": 1,
        "BiasedAttentionQuantize": 1,
    }  # fmt: skip
    return changed


def images(batch: int) -> Array:
    return np.random.default_rng(batch).standard_normal((batch, TOKENS, WIDTH)).astype(np.float32)


def test_any_number_of_threads_gives_the_same_bits(library: Path, block: onnx.ModelProto) -> None:
    wanted = [session(block, library, 1).run(None, {"x": images(batch)}) for batch in BATCHES]
    for threads in range(2, 9):
        one = session(block, library, threads)
        for batch, right in zip(BATCHES, wanted, strict=True):
            for found, array in zip(one.run(None, {"x": images(batch)}), right, strict=True):
                np.testing.assert_array_equal(found, array)


def test_an_image_has_the_same_result_in_every_batch(library: Path, block: onnx.ModelProto) -> None:
    one = session(block, library, 2)
    for batch in BATCHES:
        x = images(batch)
        together = one.run(None, {"x": x})
        for i in {0, batch // 2, batch - 1}:
            for found, right in zip(one.run(None, {"x": x[i : i + 1]}), together, strict=True):
                np.testing.assert_array_equal(found[0], right[i])
    empty = one.run(None, {"x": images(2)[:0]})
    assert [array.shape for array in empty] == [(0, TOKENS, WIDTH)] * 2


def test_concurrent_calls_on_one_session(library: Path, block: onnx.ModelProto) -> None:
    one = session(block, library, 2)
    wanted = {batch: one.run(None, {"x": images(batch)}) for batch in set(BATCHES)}

    def life(start: int) -> bool:
        batches = [BATCHES[(start + i) % len(BATCHES)] for i in range(40)]
        return all(
            np.array_equal(found, right)
            for batch in batches
            for found, right in zip(one.run(None, {"x": images(batch)}), wanted[batch], strict=True)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(life, range(4)))
