"""Small ONNX files with 8-bit products, as quantisation tools write them, and runs of them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mpcompile.runtimes.native.int8_ops import OLDEST_OPSET
from mpcompile.runtimes.native.int8_selection import inspected

# Of all u8 tensors. Values are normal with a deviation of about 1, so few reach 0 or 255.
SCALE, ZERO = 8 / 255, 128


@dataclass
class Graph:
    """A graph that grows node by node. Each method returns the name of what it computes.

    `native` counts the operators of mpcompile that the graph must get.
    """

    seed: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    stored: list[onnx.TensorProto] = field(default_factory=list)
    outputs: dict[str, int] = field(default_factory=dict)
    native: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.store("scale", np.float32(SCALE))
        self.store("zero", np.uint8(ZERO))

    def store(self, name: str, array: Any) -> str:
        self.stored.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def ints(self, *values: int) -> str:
        return self.store(f"ints{len(self.stored)}", np.array(values, np.int64))

    def floats(self, *shape: int) -> str:
        return self.store(f"floats{len(self.stored)}", self.rng.standard_normal(shape).astype(np.float32))

    def op(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        name = f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=f"n_{name}", **attributes))
        return name

    def quantize(self, x: str) -> str:
        return self.op("QuantizeLinear", [x, "scale", "zero"])

    def dequantize(self, x: str) -> str:
        return self.op("DequantizeLinear", [x, "scale", "zero"])

    def norm(self, x: str, columns: int) -> str:
        gamma = self.store(f"gamma{len(self.stored)}", self.rng.uniform(0.5, 1.2, columns).astype(np.float32))
        return self.op("LayerNormalization", [x, gamma, self.floats(columns)], axis=-1, epsilon=1e-6)

    def product(self, x: str, columns: int, rows: int, kind: str, keep: int = 8) -> str:
        """A product of a dequantised tensor: `matmul`, `matmul bias`, `gemm` or `gemm transposed`."""
        weight = self.rng.integers(1, 32, (columns, rows)) * self.rng.choice((-1, 1), (columns, rows))
        for start in range(0, columns, 16):
            block = weight[start : start + 16]
            block[self.rng.random(block.shape).argsort(0).argsort(0) >= keep] = 0
        name = f"weight{len(self.stored)}"
        scales = self.rng.uniform(0.8, 1.2, rows) / np.sqrt(np.square(weight, dtype=np.float64).sum(0).clip(1))
        turned = kind == "gemm transposed"
        self.store(name, np.ascontiguousarray(weight.T if turned else weight).astype(np.int8))
        zeros = [self.store(f"{name}.zero", np.zeros(rows, np.int8))] if self.rng.random() < 0.5 else []
        inputs = [name, self.store(f"{name}.scale", scales.astype(np.float32)), *zeros]
        values = self.op("DequantizeLinear", inputs, axis=0 if turned else 1)
        if kind == "matmul":
            return self.op("MatMul", [x, values])
        if kind == "matmul bias":
            return self.op("Add", [self.floats(rows), self.op("MatMul", [x, values])])
        bias = self.store(f"{name}.bias", self.rng.integers(-(2**14), 2**14, rows).astype(np.int32))
        bias_scale = self.store(f"{name}.bias_scale", (scales * SCALE).astype(np.float32))
        return self.op("Gemm", [x, values, self.op("DequantizeLinear", [bias, bias_scale], axis=0)], transB=int(turned))

    def output(self, name: str, kind: int = TensorProto.FLOAT) -> None:
        self.outputs[name] = kind

    def file(self, shape: Sequence[int | str]) -> onnx.ModelProto:
        given = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
        results = [
            helper.make_tensor_value_info(name, kind, [None] * len(shape)) for name, kind in self.outputs.items()
        ]
        graph = helper.make_graph(self.nodes, "graph", [given], results, self.stored)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OLDEST_OPSET)], ir_version=9)
        onnx.checker.check_model(model, full_check=True)
        return model


def session(
    file: onnx.ModelProto, library: Path | None, threads: int = 1, as_written: bool = False
) -> onnxruntime.InferenceSession:
    """`as_written`: without ONNX Runtime's own 8-bit kernels, which saturate on some processors."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(file.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(
    file: onnx.ModelProto, x: NDArray[np.float32], library: Path | None = None, as_written: bool = True
) -> list[NDArray[Any]]:
    """Returns the outputs of a file."""
    outputs: list[NDArray[Any]] = session(file, library, as_written=as_written).run(None, {"x": x})
    return outputs


def rewritten(file: onnx.ModelProto, x: NDArray[np.float32], attention: bool = True) -> onnx.ModelProto:
    """Returns the file with all native operators that it can have."""
    found = inspected(file, x)
    return found.rewritten(tuple(product.name for product in found.products), attention)


def native_operators(file: onnx.ModelProto) -> Counter[str]:
    """Counts the operators of mpcompile in a file."""
    return Counter(node.op_type for node in file.graph.node if node.domain == "mpcompile")
