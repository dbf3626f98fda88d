"""ONNX models with the native operator, and sessions on them, for the tests of the CPU kernel."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import ModelProto

from mpcompile.data.images import Data
from mpcompile.export.onnx_export import Lowered, lower
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.passes import NMMask
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.runtimes import native
from mpcompile.runtimes.native.custom_op import GEMM, function, initializer, make_node, stream_initializers
from mpcompile.runtimes.native.packing import pack

Array = NDArray[np.float32]
SPECIAL = (-0.0, np.inf, -np.inf, np.nan)


def built_library() -> Path:
    """Returns the kernel's library; skips the test if it cannot be used."""
    path = native.library()
    if path is None:
        pytest.skip(native.missing() or "")
    return path


def masked(rng: np.random.Generator, rows: int, columns: int, keep: int, of: int, sharing: int = 1) -> Array:
    """Returns a random weight that keeps `keep` of every `of`; every `sharing` neighbouring rows share one pattern."""
    scores = rng.random((rows // sharing, columns // of, of)).repeat(sharing, 0)
    kept = scores.argsort(-1).argsort(-1) < keep
    return (rng.standard_normal((rows, columns)) * kept.reshape(rows, columns)).astype(np.float32)


def one_node_model(weight: Array, bias: Array, of: int, op: str = GEMM) -> ModelProto:
    """Returns a model x -> y of one native node, with free shapes."""
    packed = pack(weight, of)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT))
    stored = [*stream_initializers("w", packed), initializer("b", bias)]
    node = make_node(op, "node", x, stored[:-1], stored[-1], packed)
    [y] = node.outputs
    y.name, y.type = "y", ir.TensorType(ir.DataType.FLOAT)
    opsets = {"": 18, "mpcompile": 1}
    graph = ir.Graph([x], [y], nodes=[node], initializers=stored, opset_imports=opsets, name="one")
    return ir.to_proto(ir.Model(graph, ir_version=8, functions=[ir.serde.deserialize_function(function(op, 18))]))


def session(file: ModelProto, library: Path | None, threads: int = 1) -> Callable[[Array], Array]:
    """Returns a function that runs a file's first input, with the kernel's library or without."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if library is not None:
        options.register_custom_ops_library(str(library))
    inference = onnxruntime.InferenceSession(file.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: inference.run(None, {inference.get_inputs()[0].name: x})[0]


@st.composite
def products(draw: st.DrawFn) -> tuple[Array, Array, Array, int]:
    """Draws x, weight, bias and the group size of the weight."""
    of = draw(st.integers(2, 64))
    keep = draw(st.integers(1, of - 1))
    sharing = draw(st.sampled_from((1, 2, 4)))
    rows = sharing * draw(st.integers(1, 40 // sharing))
    columns = of * draw(st.integers(1, max(1, 160 // of)))
    tokens = draw(st.one_of(st.integers(1, 17), st.integers(18, 110)))  # up to 16 tokens run on another kernel
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = rng.standard_normal((tokens, columns), dtype=np.float32)
    for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=4)):
        x[rng.integers(tokens), rng.integers(columns)] = value
    return x, masked(rng, rows, columns, keep, of, sharing), rng.standard_normal(rows, dtype=np.float32), of


def masked_file(model: Model, folder: Path, batch: int | None = None, pattern: str = "2:4") -> Lowered:
    """Masks a model and exports it to `model.onnx` in a folder."""
    result, _ = PassManager([NMMask(NM.parse(pattern))]).run(model, Data())
    return lower(result, folder / "model.onnx", batch=batch)
