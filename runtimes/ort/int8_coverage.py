"""Which quantised layers ONNX Runtime really runs on 8-bit kernels, from its optimised graph and its profile.

ONNX Runtime replaces a product between QuantizeLinear and DequantizeLinear nodes by an 8-bit operator if its own
conditions hold, and otherwise computes it in floating point without a word. The initializer of the weight keeps its
name in the optimised graph and is an input of the 8-bit operator that replaced the product, so it leads from the layer
to the operator. The profile of one run tells that this operator ran, and how long it took.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from mpcompile.errors import BuildError, cause_of
from mpcompile.export.eight_bit_ends import Ends, ends_of
from mpcompile.export.quantized_weights import QuantizedWeight, quantized_weights
from mpcompile.measure.quantized_layer import QuantizedLayer
from mpcompile.runtimes.native.int8_conv_ops import CONV
from mpcompile.runtimes.native.int8_ops import GEMM

PROVIDER = "CPUExecutionProvider"
KERNELS = frozenset({
    "QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QGemm",
    "DynamicQuantizeMatMul",
})  # fmt: skip
NATIVE = (GEMM, CONV)  # the first part of the names of native operators
FUSED_STEPS = ("Relu", "Clip")  # with a convolution, before its output is quantised
IN_FILE = ("Conv", "Gemm", "MatMul", "FusedConv", "FusedGemm", "FusedMatMul")
UNKNOWN = "ONNX Runtime runs it in floating point and gives no reason"


def int8_coverage(
    file: Path, images: NDArray[np.float32], threads: int | None = None, library: Path | None = None
) -> tuple[QuantizedLayer, ...]:
    """One row for each quantised layer of an 8-bit file, in file order, from a run on these images (b, c, h, w).

    `library` is the shared library of the native operators, if the file uses them. Empty for a file without 8-bit
    weights. Raises BuildError if ONNX Runtime cannot run the file.
    """
    model = onnx.load(file)
    rows = quantized_weights(model)
    if not rows:
        return ()
    try:
        optimised, times_ms = _profiled(file, images, threads, library)
    except Exception as error:  # ONNX Runtime's own types
        raise BuildError(f"ONNX Runtime cannot profile {file.name}: {cause_of(error)}") from error
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in optimised.graph.node:
        if node.op_type in KERNELS or node.op_type.startswith(NATIVE):
            for name in node.input:
                users.setdefault(name, []).append(node)
    native = {node.name: node for node in optimised.graph.node if node.op_type.startswith(NATIVE)}
    ends = ends_of(model, FUSED_STEPS)
    nodes = {node.name: node for node in model.graph.node}
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    readers = {name: node for node in model.graph.node for name in node.input}
    found = []
    for row in rows:
        # A native operator has its product's name, and the weight of a Gemm under a name of its own.
        turned = [native[name] for name in row.nodes if name in native and row.initializer not in native[name].input]
        ran = [node for node in (*users.get(row.initializer, ()), *turned) if node.name in times_ms]
        whole = len(ran) >= len(row.nodes)
        reason = None if whole else _reason(row, len(ran), nodes, ends, types, readers)
        kernel, ms = _kernel(row, ran, optimised, times_ms, whole)
        found += [QuantizedLayer(layer, row.initializer, row.op, whole, kernel, reason, ms) for layer in row.layers]
    return tuple(found)


def _profiled(
    file: Path, images: NDArray[np.float32], threads: int | None, library: Path | None
) -> tuple[onnx.ModelProto, Mapping[str, float]]:
    """The optimised graph, without weights, and the milliseconds of each of its nodes in the second of two runs."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
        if threads:
            options.intra_op_num_threads = threads
        if library is not None:
            options.register_custom_ops_library(str(library))
        session = onnxruntime.InferenceSession(file, options, providers=[PROVIDER])
        given = session.get_inputs()[0]
        fixed = given.shape[0]
        if isinstance(fixed, int):
            images = np.resize(images, (fixed, *images.shape[1:]))
        for _ in range(2):
            session.run(None, {given.name: np.ascontiguousarray(images)})
        events: Sequence[Mapping[str, Any]] = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        optimised = onnx.load(Path(folder) / "optimised.onnx", load_external_data=False)
    suffix = "_kernel_time"
    kernels = [event for event in events if event.get("cat") == "Node" and str(event["name"]).endswith(suffix)]
    # Later runs replace the times of the first, which loads caches.
    return optimised, {str(event["name"]).removesuffix(suffix): event["dur"] / 1000 for event in kernels}


def _kernel(
    row: QuantizedWeight,
    ran: Sequence[onnx.NodeProto],
    optimised: onnx.ModelProto,
    times_ms: Mapping[str, float],
    whole: bool,
) -> tuple[str | None, float | None]:
    """The operator that ran for a weight, and its time; a float one is found by its name, if it kept that."""
    used = list(ran)
    if not whole:
        nodes = (node for node in optimised.graph.node if node.op_type in IN_FILE)
        used += [node for node in nodes if _name_in_file(node.name) in row.nodes]
    timed = [times_ms[node.name] for node in used if node.name in times_ms]
    kernel = used[-1].op_type if used else None
    return kernel, sum(timed) if len(timed) == len(row.nodes) else None


def _name_in_file(name: str) -> str:
    """The name of the product in the file from which ONNX Runtime made a floating-point node."""
    return name.removeprefix("fused ").removesuffix("/MatMulAddFusion")


def _reason(
    row: QuantizedWeight,
    ran: int,
    nodes: Mapping[str, onnx.NodeProto],
    ends: Mapping[str, Ends],
    types: Mapping[str, int],
    readers: Mapping[str, onnx.NodeProto],
) -> str:
    """Why products with a weight do not run in 8 bits, from ONNX Runtime's conditions."""
    some = f"{ran} of {len(row.nodes)} products with its weight run in 8 bits; of the others, " if ran else ""
    for name in row.nodes:
        node, end = nodes[name], ends[name]
        if end.reads is not None:
            return f"{some}the input is not quantised ({end.reads})"
        if row.op == "Conv" and end.returns is not None:
            return f"{some}the output is not quantised ({end.returns}), and it has no such 8-bit convolution"
        if row.op == "Conv" and (rectifier := _kept_rectifier(node, readers, types)):
            return (
                f"{some}{rectifier} stands between it and its 8-bit output; with signed activations it is not dropped"
            )
        bias, step = _bias_and_next(node, readers, types)
        if types.get(bias) == TensorProto.FLOAT:
            operator = "Conv" if row.op == "Conv" else "Gemm"
            return f"{some}the bias is float32, and its 8-bit {operator} adds 32-bit integers"
        if row.op != "Conv" and step is not None and step.op_type in FUSED_STEPS:
            return (
                f"{some}{step.op_type} {step.name} comes after it, and ONNX Runtime fuses the two in floating point, "
                "unless a QuantizeLinear follows that clips in the same way"
            )
    return some + UNKNOWN if some else UNKNOWN


def _bias_and_next(
    node: onnx.NodeProto, readers: Mapping[str, onnx.NodeProto], types: Mapping[str, int]
) -> tuple[str, onnx.NodeProto | None]:
    """The name of what is added to a product, empty for nothing, and the node that reads the sum.

    A constant that an Add adds to a MatMul is a bias: ONNX Runtime turns both into a Gemm if the shapes are fixed.
    """
    step = readers.get(node.output[0])
    if node.op_type != "MatMul" or step is None or step.op_type != "Add":
        return node.input[2] if len(node.input) > 2 else "", step
    bias = next((name for name in step.input if name in types), "")
    return bias, readers.get(step.output[0])


def _kept_rectifier(
    node: onnx.NodeProto, readers: Mapping[str, onnx.NodeProto], types: Mapping[str, int]
) -> str | None:
    """The operator between a convolution and its QuantizeLinear, if that is signed.

    An unsigned grid that starts at 0 clips negative values itself, so that ONNX Runtime can drop a rectifier.
    """
    step = readers.get(node.output[0])
    if step is None or step.op_type not in FUSED_STEPS:
        return None
    quantise = readers.get(step.output[0])
    signed = quantise is not None and len(quantise.input) > 2 and types.get(quantise.input[2]) == TensorProto.INT8
    return f"{step.op_type} {step.name}" if signed else None
