"""Model -> ONNX file: export, precision, metadata, and a file that was read back and proven.

Opset 20 by default: the newest in which TensorRT's parser fuses attention from plain operators, with LayerNorm
and Gelu as operators of their own; for bfloat16 opset 22, before which convolutions do not know it. Half precision is
written into the graph, since TensorRT 11 has no other way.
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

from mpcompile.errors import BuildError, MaskError, UsageError, cause_of
from mpcompile.export.half_precision import to_bfloat16, to_half
from mpcompile.export.mask_check import METADATA_KEY, NAME_SCOPES, ProvenMask, prove
from mpcompile.ir.model import Model
from mpcompile.ir.token_merging import merges_tokens

log = logging.getLogger(__name__)

Precision = Literal["fp32", "fp16", "bf16"]
OPSET, BFLOAT16_OPSET = 20, 22
INPUT, OUTPUT = "images", "logits"
# A protocol buffer ends at 2 GiB; the rest of the graph needs some of it.
INLINE_LIMIT_BYTES = 2_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """An ONNX file of a model, and what a runtime has to know of it. `batch` is None where the batch is free."""

    onnx: Path
    arch: str
    image_shape: tuple[int, ...]  # channels, height, width
    precision: Precision
    batch: int | None
    masks: tuple[ProvenMask, ...] = ()
    merges: bool = False  # whether tokens are merged in it


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowered(Exported):
    """A model and the ONNX file that it became."""

    model: Model
    opset: int


def lower(
    model: Model,
    path: Path,
    *,
    precision: Precision = "fp32",
    batch: int | None = None,
    opset: int | None = None,
    metadata: Mapping[str, str] | None = None,
    inline_limit_bytes: int = INLINE_LIMIT_BYTES,
) -> Lowered:
    """The model as a checked ONNX file, each of its masks found in it.

    Over `inline_limit_bytes` the weights go into a file beside it. Raises BuildError where the exporter fails,
    MaskError where a mask is not in the file.
    """
    opset = opset or (BFLOAT16_OPSET if precision == "bf16" else OPSET)
    if precision == "bf16" and opset < BFLOAT16_OPSET:
        raise UsageError(
            f"bf16 needs opset {BFLOAT16_OPSET} or later, where convolutions know it; {opset} was asked for"
        )
    file = _export(model, batch, opset)
    _drop_build_traces(file)
    if precision == "fp16":
        file = to_half(file)
    elif precision == "bf16":
        file = to_bfloat16(file)
    weights = model.graph.state_dict()
    masks = prove(file, model.plan, weights)
    _write_metadata(file, {**(metadata or {}), "mpcompile.precision": precision}, masks)
    _save(file, path, inline_limit_bytes)
    if prove(onnx.load(path), model.plan, weights) != masks:
        raise MaskError(f"{path.name} does not hold the masks that were written to it")
    return Lowered(
        onnx=path,
        arch=model.source.arch,
        image_shape=tuple(model.example.shape[1:]),
        precision=precision,
        batch=batch,
        masks=masks,
        merges=merges_tokens(model.graph.graph),
        model=model,
        opset=opset,
    )


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
            f"torch.onnx cannot export {model.source.arch} with a {free}{hint}: {cause_of(error)}"
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
