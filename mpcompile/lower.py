"""Model -> ONNX file: export, precision, metadata, and a file that was read back and proven.

Opset 20 by default: the newest in which TensorRT's parser fuses attention from plain operators, with LayerNorm
and Gelu as operators of their own. Half precision is written into the graph, since TensorRT 11 has no other way;
normalisations, softmax, the reductions they are made of and the matching of tokens stay in float32, inputs and
outputs too.
"""

import json
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mpcompile.errors import BuildError, MaskError
from mpcompile.model import Model
from mpcompile.proof import METADATA_KEY, NAME_SCOPES, ProvenMask, prove

log = logging.getLogger(__name__)

Precision = Literal["fp32", "fp16"]
INPUT, OUTPUT = "images", "logits"
# A protocol buffer ends at 2 GiB; the rest of the graph needs some of it.
INLINE_LIMIT_BYTES = 2_000_000_000
# Sums over many terms, and squares: where half precision runs out of range or digits.
KEPT_IN_FLOAT32 = (
    "Softmax", "LogSoftmax", "LayerNormalization", "RMSNormalization", "BatchNormalization", "GroupNormalization",
    "InstanceNormalization", "LpNormalization", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "Pow",
    "Sqrt", "Reciprocal",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Lowered:
    """A model and the ONNX file that it became. `batch` is None where the batch is free."""

    model: Model
    onnx: Path
    precision: Precision
    batch: int | None
    opset: int
    masks: tuple[ProvenMask, ...] = ()


def lower(
    model: Model,
    path: Path,
    *,
    precision: Precision = "fp32",
    batch: int | None = None,
    opset: int = 20,
    metadata: Mapping[str, str] | None = None,
    inline_limit_bytes: int = INLINE_LIMIT_BYTES,
) -> Lowered:
    """The model as a checked ONNX file, each of its masks found in it.

    Over `inline_limit_bytes` the weights go into a file beside it. Raises BuildError where the exporter fails,
    MaskError where a mask is not in the file.
    """
    file = _export(model, batch, opset)
    _drop_build_traces(file)
    if precision == "fp16":
        file = to_half(file)
    weights = model.graph.state_dict()
    masks = prove(file, model.plan, weights)
    _write_metadata(file, {**(metadata or {}), "mpcompile.precision": precision}, masks)
    _save(file, path, inline_limit_bytes)
    if prove(onnx.load(path), model.plan, weights) != masks:
        raise MaskError(f"{path.name} does not hold the masks that were written to it")
    return Lowered(model, path, precision, batch, opset, masks)


def _export(model: Model, batch: int | None, opset: int) -> onnx.ModelProto:
    """The graph through torch's exporter, in float32."""
    example = model.example if batch is None else model.example[:1].expand(batch, -1, -1, -1).contiguous()
    shapes = ({0: torch.export.Dim("batch", min=1, max=65536)},) if batch is None else None
    free = "free batch" if batch is None else f"batch of {batch}"
    try:
        # The plain form of attention: the fused CPU kernel promises strides that its decomposition does not keep,
        # and BEiT's export fails on them.
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.simplefilter("ignore")  # the exporter's own deprecations
            program = torch.onnx.export(
                model.graph,
                (example,),
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=shapes,
                optimize=True,
                verbose=False,
                custom_translation_table={torch.ops.aten.sort.stable: _sorted_stably},
            )
    except Exception as error:
        hint = "; try a fixed one, --batch 1" if batch is None else ""
        raise BuildError(
            f"torch.onnx cannot export {model.source.arch} with a {free}{hint}: {_cause(error)}"
        ) from error
    if program is None:
        raise BuildError(f"torch.onnx returned nothing for {model.source.arch}")
    file: onnx.ModelProto = program.model_proto
    return file


def _sorted_stably(values: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """torch.sort(stable=True), which the exporter lacks, as a TopK of all: of equal numbers the first comes first."""
    from onnxscript import opset18

    count: Any = opset18.Constant(value_ints=[values.shape[dim]])
    return opset18.TopK(values, count, axis=dim, largest=int(descending), sorted=1)


def _cause(error: BaseException) -> str:
    """The first line of the innermost reason: torch wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _drop_build_traces(file: onnx.ModelProto) -> None:
    """Keeps each node's module path and drops what else the exporter wrote: stack traces with local file names."""
    for node in file.graph.node:
        kept = [p for p in node.metadata_props if p.key == NAME_SCOPES]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
        node.doc_string = ""
    for value in (*file.graph.value_info, *file.graph.input, *file.graph.output, *file.graph.initializer):
        del value.metadata_props[:]
    del file.graph.metadata_props[:]


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
        raise BuildError(f"the graph cannot be written in float16: {_cause(error)}") from error
    for node in half.graph.node:
        if not node.metadata_props and node.name in scopes:
            node.metadata_props.extend(scopes[node.name])
    _drop_round_trips(half.graph)
    del half.graph.value_info[:]  # the converter leaves the types of before around the operators it spared
    ordered = onnx_ir.from_proto(half)  # and appends its casts at the end
    ordered.graph.sort()
    result: onnx.ModelProto = onnx_ir.to_proto(ordered)
    return result


def _drop_round_trips(graph: onnx.GraphProto) -> None:
    """Lets neighbours that were kept in float32 hand on what they computed: the converter rounds it in between."""
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    casts = {node.output[0]: node for node in graph.node if node.op_type == "Cast"}
    target = {output: next(a.i for a in node.attribute if a.name == "to") for output, node in casts.items()}
    unrounded = {
        output: casts[node.input[0]].input[0]
        for output, node in casts.items()
        if target[output] == single and target.get(node.input[0]) == half
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


def _write_metadata(file: onnx.ModelProto, metadata: Mapping[str, str], masks: tuple[ProvenMask, ...]) -> None:
    """Writes what later tools need to know, as the last step: optimisers drop metadata."""
    sparsity = {
        row.initializer: {
            "layers": [other.layer for other in masks if other.initializer == row.initializer],
            "axis": row.axis,
            "group_size": row.group_size,
            "zero_count": row.group_size - int(row.pattern.split(":")[0]) if ":" in row.pattern else None,
            "pattern": row.pattern,
            "zeros": row.zeros,
            "size": row.size,
        }
        for row in masks
    }
    for key, value in {**metadata, METADATA_KEY: json.dumps(sparsity)}.items():
        entry = next((p for p in file.metadata_props if p.key == key), None) or file.metadata_props.add(key=key)
        entry.value = value


def _save(file: onnx.ModelProto, path: Path, inline_limit_bytes: int) -> None:
    """Writes the file, its weights beside it where they do not fit into a protocol buffer, and checks it."""
    external = sum(tensor.ByteSize() for tensor in file.graph.initializer) > inline_limit_bytes
    if external:
        onnx.save_model(
            file, path, save_as_external_data=True, all_tensors_to_one_file=True, location=f"{path.name}.data"
        )
    else:
        onnx.save_model(file, path)
    try:
        onnx.checker.check_model(path, full_check=not external)
    except onnx.checker.ValidationError as error:
        raise BuildError(f"the exported {path.name} is not valid ONNX: {error}") from error
