"""Converts an ONNX graph to float16 or bfloat16.

Normalisations, softmax, the reductions they consist of, token matching, and the graph's inputs and outputs stay in
float32. onnxruntime's converter inserts the casts for float16. The bfloat16 file has the same casts with the other
type, and its weights are rounded from float32, not from float16. ONNX Runtime has no bfloat16 kernels for CPUs;
`to_float32` gives the same graph in float32 with the rounded weights, so that it can be checked there.
"""

import warnings
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from mpcompile.errors import BuildError, cause_of

HALF, BFLOAT, SINGLE = onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
# Sums over many terms, and squares: half precision overflows or loses digits in them.
KEPT_IN_FLOAT32 = (
    "Softmax", "LogSoftmax", "LayerNormalization", "RMSNormalization", "BatchNormalization", "GroupNormalization",
    "InstanceNormalization", "LpNormalization", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "Pow",
    "Sqrt", "Reciprocal",
)  # fmt: skip


def to_half(file: onnx.ModelProto) -> onnx.ModelProto:
    """The float32 graph in float16; operators of KEPT_IN_FLOAT32, input and output stay in float32.

    Raises BuildError if the converter fails.
    """
    import onnx_ir
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    scopes = {node.name: list(node.metadata_props) for node in file.graph.node}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of each value outside the range; the parity check decides
            half: onnx.ModelProto = convert_float_to_float16(
                file,
                keep_io_types=True,
                op_block_list=[*DEFAULT_OP_BLOCK_LIST, *KEPT_IN_FLOAT32],
                node_block_list=_matching_tokens(file),
                # The exporter wrote every shape. Inferring shapes serialises the file, which fails above 2 GB.
                disable_shape_infer=True,
            )
    except Exception as error:
        raise BuildError(f"the graph cannot be written in float16: {cause_of(error)}") from error
    for node in half.graph.node:
        if not node.metadata_props and node.name in scopes:
            node.metadata_props.extend(scopes[node.name])
    _drop_round_trips(half.graph)
    del half.graph.value_info[:]  # the converter leaves outdated types around operators that it did not convert
    ordered = onnx_ir.from_proto(half)  # the converter appends its casts at the end, out of topological order
    ordered.graph.sort()
    result: onnx.ModelProto = onnx_ir.to_proto(ordered)
    return result


def to_bfloat16(file: onnx.ModelProto) -> onnx.ModelProto:
    """The float32 graph in bfloat16, with casts between the same operators as in float16. Raises BuildError."""
    exact = {tensor.name: numpy_helper.to_array(tensor) for tensor in file.graph.initializer}
    exact |= {node.output[0]: numpy_helper.to_array(tensor) for node, tensor in _constants(file)}
    result = to_half(file)
    for tensor in result.graph.initializer:
        _retype(tensor, HALF, BFLOAT, exact.get(tensor.name))
    for node, tensor in _constants(result):
        _retype(tensor, HALF, BFLOAT, exact.get(node.output[0]))
    _recast(result, HALF, BFLOAT)
    return result


def to_float32(file: onnx.ModelProto) -> onnx.ModelProto:
    """A bfloat16 graph as a float32 graph: weights keep their bfloat16 rounding, activations are float32."""
    result = onnx.ModelProto()
    result.CopyFrom(file)
    for tensor in result.graph.initializer:
        _retype(tensor, BFLOAT, SINGLE, None)
    for _, tensor in _constants(result):
        _retype(tensor, BFLOAT, SINGLE, None)
    _recast(result, BFLOAT, SINGLE)
    return result


def _constants(file: onnx.ModelProto) -> list[tuple[onnx.NodeProto, onnx.TensorProto]]:
    """Every tensor attribute, with its node."""
    return [(node, a.t) for node in file.graph.node for a in node.attribute if a.type == onnx.AttributeProto.TENSOR]


def _retype(tensor: onnx.TensorProto, old: int, new: int, exact: NDArray[Any] | None) -> None:
    """Converts a tensor of type `old` to `new` in place, from `exact` values if given; other types stay."""
    if tensor.data_type == old:
        kind = onnx.helper.tensor_dtype_to_np_dtype(new)
        values = numpy_helper.to_array(tensor) if exact is None else exact
        tensor.CopyFrom(numpy_helper.from_array(np.asarray(values).astype(kind), tensor.name))


def _recast(file: onnx.ModelProto, old: int, new: int) -> None:
    """Changes casts to type `old` into casts to `new`, and drops the recorded types of intermediate values."""
    del file.graph.value_info[:]
    for node in file.graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == old:
                attribute.i = new


def _drop_round_trips(graph: onnx.GraphProto) -> None:
    """Removes float32 -> float16 -> float32 cast pairs between operators that stay in float32."""
    casts = {node.output[0]: node for node in graph.node if node.op_type == "Cast"}
    target = {output: next(a.i for a in node.attribute if a.name == "to") for output, node in casts.items()}
    # A cast from a third type, such as the boolean of a comparison, rounds nothing and stays.
    other = {v.name for v in graph.value_info if v.type.tensor_type.elem_type not in (SINGLE, HALF)}
    unrounded = {
        output: casts[node.input[0]].input[0]
        for output, node in casts.items()
        if target[output] == SINGLE and target.get(node.input[0]) == HALF and casts[node.input[0]].input[0] not in other
    }
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = unrounded.get(name, name)
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    kept = [node for node in graph.node if node.op_type != "Cast" or node.output[0] in used]
    # A cast may have been used only by a cast that was just removed.
    used = {name for node in kept for name in node.input} | {output.name for output in graph.output}
    kept = [node for node in kept if node.op_type != "Cast" or node.output[0] in used]
    del graph.node[:]
    graph.node.extend(kept)


def _matching_tokens(file: onnx.ModelProto) -> list[str]:
    """The nodes of token matching, from the mean over heads to TopK and ArgMax.

    In half precision they would merge other tokens.
    """
    producer = {output: node for node in file.graph.node for output in node.output}
    found: dict[str, onnx.NodeProto] = {}
    waiting = [node for node in file.graph.node if node.op_type in ("TopK", "ArgMax")]
    while waiting:
        node = waiting.pop()
        if node.name not in found:
            found[node.name] = node
            if node.op_type != "ReduceMean":
                waiting += [producer[name] for name in node.input if name in producer]
    return list(found)
