"""Half precision, written into an ONNX graph: float16 or bfloat16.

Normalisations, softmax, the reductions they are made of and the matching of tokens stay in float32, inputs and outputs
too. onnxruntime's converter knows where float16 needs casts; the bfloat16 file has the same casts with the other type,
and its weights are rounded from float32, not from float16. ONNX Runtime has no bfloat16 kernels on a CPU: `widened` is
the same graph in float32, on the same rounded weights, for checks there.
"""

import warnings
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from mpcompile.errors import BuildError, cause_of

HALF, BFLOAT, SINGLE = onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
# Sums over many terms, and squares: where half precision runs out of range or digits.
KEPT_IN_FLOAT32 = (
    "Softmax", "LogSoftmax", "LayerNormalization", "RMSNormalization", "BatchNormalization", "GroupNormalization",
    "InstanceNormalization", "LpNormalization", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "Pow",
    "Sqrt", "Reciprocal",
)  # fmt: skip


def to_half(file: onnx.ModelProto) -> onnx.ModelProto:
    """The graph in float16, with the operators of KEPT_IN_FLOAT32, the input and the output in float32."""
    import onnx_ir
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    scopes = {node.name: list(node.metadata_props) for node in file.graph.node}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of each number that half precision cannot hold; parity judges
            half: onnx.ModelProto = convert_float_to_float16(
                file,
                keep_io_types=True,
                op_block_list=[*DEFAULT_OP_BLOCK_LIST, *KEPT_IN_FLOAT32],
                node_block_list=_matching_tokens(file),
                # The exporter wrote every shape; inferring them anew would serialise the file, which ends at 2 GB.
                disable_shape_infer=True,
            )
    except Exception as error:
        raise BuildError(f"the graph cannot be written in float16: {cause_of(error)}") from error
    for node in half.graph.node:
        if not node.metadata_props and node.name in scopes:
            node.metadata_props.extend(scopes[node.name])
    _drop_round_trips(half.graph)
    del half.graph.value_info[:]  # the converter leaves the types of before around the operators it spared
    ordered = onnx_ir.from_proto(half)  # and appends its casts at the end
    ordered.graph.sort()
    result: onnx.ModelProto = onnx_ir.to_proto(ordered)
    return result


def to_bfloat16(file: onnx.ModelProto) -> onnx.ModelProto:
    """The graph in bfloat16, with casts where the float16 one has them."""
    exact = {tensor.name: numpy_helper.to_array(tensor) for tensor in file.graph.initializer}
    exact |= {node.output[0]: numpy_helper.to_array(tensor) for node, tensor in _constants(file)}
    result = to_half(file)
    for tensor in result.graph.initializer:
        _retype(tensor, HALF, BFLOAT, exact.get(tensor.name))
    for node, tensor in _constants(result):
        _retype(tensor, HALF, BFLOAT, exact.get(node.output[0]))
    _recast(result, HALF, BFLOAT)
    return result


def widened(file: onnx.ModelProto) -> onnx.ModelProto:
    """A bfloat16 graph in float32: its weights as they were rounded, its other numbers in full."""
    result = onnx.ModelProto()
    result.CopyFrom(file)
    for tensor in result.graph.initializer:
        _retype(tensor, BFLOAT, SINGLE, None)
    for _, tensor in _constants(result):
        _retype(tensor, BFLOAT, SINGLE, None)
    _recast(result, BFLOAT, SINGLE)
    return result


def _constants(file: onnx.ModelProto) -> list[tuple[onnx.NodeProto, onnx.TensorProto]]:
    """Every tensor that stands in an attribute, with its node."""
    return [(node, a.t) for node in file.graph.node for a in node.attribute if a.type == onnx.AttributeProto.TENSOR]


def _retype(tensor: onnx.TensorProto, old: int, new: int, exact: NDArray[Any] | None) -> None:
    """The tensor in another type, from exact numbers where there are any; one of a third type is left alone."""
    if tensor.data_type == old:
        kind = onnx.helper.tensor_dtype_to_np_dtype(new)
        values = numpy_helper.to_array(tensor) if exact is None else exact
        tensor.CopyFrom(numpy_helper.from_array(np.asarray(values).astype(kind), tensor.name))


def _recast(file: onnx.ModelProto, old: int, new: int) -> None:
    """Turns casts to one type into casts to another, and drops the types that were noted of values."""
    del file.graph.value_info[:]
    for node in file.graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == old:
                attribute.i = new


def _drop_round_trips(graph: onnx.GraphProto) -> None:
    """Lets neighbours that were kept in float32 hand on what they computed: the converter rounds it in between."""
    casts = {node.output[0]: node for node in graph.node if node.op_type == "Cast"}
    target = {output: next(a.i for a in node.attribute if a.name == "to") for output, node in casts.items()}
    # A cast from a number that was none, such as the result of a comparison, is no rounding, and stays.
    other = {v.name for v in graph.value_info if v.type.tensor_type.elem_type not in (SINGLE, HALF)}
    unrounded = {
        output: casts[node.input[0]].input[0]
        for output, node in casts.items()
        if target[output] == SINGLE and target.get(node.input[0]) == HALF and casts[node.input[0]].input[0] not in other
    }
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = unrounded.get(name, name)
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    kept = [node for node in graph.node if node.op_type != "Cast" or node.output[0] in used]
    # A cast may have been used by another that goes.
    used = {name for node in kept for name in node.input} | {output.name for output in graph.output}
    kept = [node for node in kept if node.op_type != "Cast" or node.output[0] in used]
    del graph.node[:]
    graph.node.extend(kept)


def _matching_tokens(file: onnx.ModelProto) -> list[str]:
    """The nodes from the mean over heads to the ranking of pairs: in half precision other tokens would merge."""
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
