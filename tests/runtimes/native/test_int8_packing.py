"""Packing of int8 weights: rows that share a mask share it in the kernel too, also if some kept weights are zero."""

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from native_models import built_library, masked
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from mpcompile.runtimes.native import build, int8_ops
from mpcompile.runtimes.native.custom_op import DOMAIN, VERSION
from mpcompile.runtimes.native.microbenchmark import session


def test_a_kept_weight_may_be_zero(tmp_path: Path) -> None:
    """Rounding takes one kept weight in a hundred to zero. Rows must still share, which is 1.4 times as fast."""
    if obstacle := build.unbuildable():
        pytest.skip(obstacle)
    program = tmp_path / "int8_packing_test"
    sources = [str(Path(__file__).parent / "int8_packing_test.cpp"), str(build.SOURCES / "int8_packing.cpp")]
    build.run(["-std=c++17", "-O0", f"-I{build.SOURCES}", *sources, "-o", str(program)])
    shared = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
    assert shared == ["1", "1", "1", "2", "2", "2", "4", "4", "4"]


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 4), (4, 16)])
@pytest.mark.parametrize("sharing", [1, 2, 4])
def test_results_are_exact_with_zeros_among_kept_weights(keep: int, of: int, sharing: int) -> None:
    library, rng = built_library(), np.random.default_rng(0)
    rows, columns = 136, 96
    kept = masked(rng, rows, columns, keep, of, sharing) != 0
    weight = (rng.integers(-14, 15, kept.shape) * kept * (rng.random(kept.shape) > 0.05)).astype(np.int8)
    x = rng.integers(0, 256, (1, 7, columns), dtype=np.uint8)
    found = session(_one_node(np.ascontiguousarray(weight.T)), library, 1).run(None, {"x": x})[0]
    np.testing.assert_array_equal(found, (x.astype(np.int64) - 128) @ weight.T.astype(np.int64))


def _one_node(weight: NDArray[np.int8]) -> ModelProto:
    """Returns a model x -> y of one product, whose float32 results are its integers."""
    node = helper.make_node(int8_ops.GEMM, ["x", "w", "s", "b"], ["y"], domain=DOMAIN, x_scale=1.0, x_zero=128)
    rows = weight.shape[1]
    arrays: dict[str, NDArray[Any]] = {"w": weight, "s": np.ones(rows, np.float32), "b": np.zeros(rows, np.float32)}
    graph = helper.make_graph(
        [node], "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, VERSION)]
    functions = [int8_ops.function(int8_ops.GEMM, 21)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)
