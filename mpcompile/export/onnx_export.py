"""Model -> ONNX file: export, precision, metadata, and verification of the masks in the written file.

Opset 20 by default: it is the newest in which TensorRT's parser fuses attention from plain operators, and it has
LayerNormalization and Gelu as single operators. bfloat16 needs opset 22 for convolutions. Half precision is written
into the graph, since TensorRT 11 offers no other way.

In the 8-bit precisions activations are rounded by QuantizeLinear and DequantizeLinear, and weights are stored in 8 bits
(quantized_weights.py). With u8 activations the opset is 21. With signed ones, for TensorRT, it stays 20: ONNX Runtime
1.32 on x86 turns signed activations into unsigned ones, and from opset 21 on refuses some graphs that result.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx

from mpcompile.errors import BuildError, MaskError, UsageError
from mpcompile.export.half_precision import to_bfloat16, to_half
from mpcompile.export.mask_check import METADATA_KEY, NAME_SCOPES, ProvenMask, verify_masks
from mpcompile.export.translation import Translation, translated
from mpcompile.ir.model import Model
from mpcompile.ir.precision import QUANTIZED, Precision
from mpcompile.ir.quantization import quantizers
from mpcompile.ir.token_merging import merges_tokens
from mpcompile.system.progress import PARTS, tracked

log = logging.getLogger(__name__)

OPSET, QUANTIZED_OPSET, BFLOAT16_OPSET = 20, 21, 22
INPUT, OUTPUT = "images", "logits"
# A protocol buffer holds at most 2 GiB; the rest leaves room for the graph.
INLINE_LIMIT_BYTES = 2_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """An ONNX file and the facts that a runtime needs. `batch` is None if the batch axis is dynamic.

    `masks` are the masks that were verified in the file.
    """

    onnx: Path
    arch: str
    image_shape: tuple[int, ...]  # channels, height, width
    precision: Precision
    batch: int | None
    masks: tuple[ProvenMask, ...] = ()
    merges: bool = False  # whether it merges tokens
    input_names: tuple[str, ...] = (INPUT,)  # the images first
    output_names: tuple[str, ...] = (OUTPUT,)  # the primary output first


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowered(Exported):
    """An exported ONNX file with the model that it was exported from, and its opset."""

    model: Model
    opset: int
    translation: Translation | None = field(default=None, repr=False, compare=False)  # for `like`


def lower(
    model: Model,
    path: Path,
    *,
    precision: Precision = "fp32",
    batch: int | None = None,
    opset: int | None = None,
    metadata: Mapping[str, str] | None = None,
    inline_limit_bytes: int = INLINE_LIMIT_BYTES,
    like: Lowered | None = None,
) -> Lowered:
    """Exports a model as an ONNX file, verifies each of its masks in the written file, and returns both.

    Args:
        model: the captured model.
        path: the ONNX file to write.
        precision: of the matrix products and convolutions in the file. A model that the quantize pass has quantised
            is written in the type of its activations, int8 or fp8.
        batch: a fixed batch size; None for a dynamic batch axis.
        opset: the ONNX opset; None for 20, 21 for int8 with u8 activations, or 22 for bf16.
        metadata: entries to add to the file's metadata.
        inline_limit_bytes: if the weights are larger, they go into a second file, `<name>.data`.
        like: an earlier result. If its model differs in values only, it is not translated again, which takes seconds.

    Raises UsageError for an opset that is too early for the precision, or a precision that the model is not quantised
    to; BuildError if the export fails; MaskError if a mask is missing.
    """
    _require_quantised_to(model, precision)
    opset = _opset(model, precision, opset)
    steps = tracked(("translate to ONNX", "find the masks in it", "write the file", "check the file"), unit=PARTS)
    next(steps)
    translation, file = translated(model, batch, opset, None if like is None else like.translation)
    _drop_build_traces(file)
    if precision == "fp16":
        file = to_half(file)
    elif precision == "bf16":
        file = to_bfloat16(file)
    weights = model.graph.state_dict()
    written = {**(metadata or {}), "mpcompile.precision": precision}
    if precision in QUANTIZED:
        # Imported here, since onnx_ir takes long to import.
        from mpcompile.export.quantized_weights import METADATA_KEY as QUANTIZATION_KEY
        from mpcompile.export.quantized_weights import metadata_of, with_quantized_weights

        file, rows = with_quantized_weights(file, model.plan, weights, precision)
        written[QUANTIZATION_KEY] = metadata_of(rows)
    next(steps)
    masks = verify_masks(file, model.plan, weights)
    next(steps)
    _write_metadata(file, written, masks)
    _save(file, path, inline_limit_bytes)
    next(steps)
    if verify_masks(onnx.load(path), model.plan, weights) != masks:
        raise MaskError(f"{path.name} does not hold the masks that were written to it")
    return Lowered(
        onnx=path,
        arch=model.source.arch,
        image_shape=tuple(model.example.shape[1:]),
        precision=precision,
        batch=batch,
        masks=masks,
        merges=merges_tokens(model.graph.graph),
        input_names=model.input_names,
        output_names=model.output_names,
        model=model,
        opset=opset,
        translation=translation,
    )


def _opset(model: Model, precision: Precision, given: int | None) -> int:
    """The opset of the file. Raises UsageError if the given one is too early for the precision."""
    if precision == "bf16":
        needed, lacks = BFLOAT16_OPSET, "bfloat16 convolutions"
    elif precision in QUANTIZED:
        unsigned = any(quantizer.kind == "u8" for quantizer in quantizers(model.graph).values())
        needed, lacks = QUANTIZED_OPSET if unsigned else OPSET, f"QuantizeLinear as {precision} uses it"
    else:
        return given or OPSET
    if given is not None and given < needed:
        raise UsageError(f"opset {given} has no {lacks}; {precision} needs opset {needed} or later")
    return given or needed


def _require_quantised_to(model: Model, precision: Precision) -> None:
    """Raises UsageError if the model is quantised and the precision is another, or the other way round."""
    stored = {quantizer.kind for quantizer in quantizers(model.graph).values()}
    own = ("fp8" if "fp8" in stored else "int8") if model.scales() else None
    if precision in QUANTIZED and own is None:
        raise UsageError(
            f"the model has no quantised layer, so it cannot be written in {precision}; run the pass quantize, or use "
            "fp32, fp16 or bf16"
        )
    if own is not None and precision != own:
        raise UsageError(f"the model is quantised to {own} and cannot be written in {precision}; use --precision {own}")


def _drop_build_traces(file: onnx.ModelProto) -> None:
    """Drops the exporter's stack traces, which hold local file names; keeps each node's module path."""
    for node in file.graph.node:
        kept = [p for p in node.metadata_props if p.key == NAME_SCOPES]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
        node.doc_string = ""
    for value in (*file.graph.value_info, *file.graph.input, *file.graph.output, *file.graph.initializer):
        del value.metadata_props[:]
    del file.graph.metadata_props[:]


def _write_metadata(file: onnx.ModelProto, metadata: Mapping[str, str], masks: tuple[ProvenMask, ...]) -> None:
    """Writes the metadata of the masks. This is the last step, since graph optimisers drop metadata."""
    sparsity = {
        row.initializer: {
            "layers": [other.layer for other in masks if other.initializer == row.initializer],
            "axis": row.axis,
            "group_size": row.group_size,
            "zero_count": row.nm.of - row.nm.keep if row.nm else None,
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
    """Writes and checks the file; weights that exceed the limit go into `<name>.data`. Raises BuildError."""
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
