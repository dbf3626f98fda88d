"""Verifies that every planned mask is in an ONNX file, on the reduction axis of its product.

Exporters rename, transpose and fold weights. A Linear on a 3-D input becomes a MatMul whose initializer is the
transpose under a new name, so its groups lie along axis 0; a BatchNorm is multiplied into the convolution before it.
The weights are therefore read back from the file and compared with the masks, one by one.
"""

import ast
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from mpcompile.errors import MaskError
from mpcompile.ir.model import LayerPlan
from mpcompile.ir.pattern import NM
from mpcompile.ir.weight_groups import pattern_violation

NAME_SCOPES = "pkg.torch.onnx.name_scopes"
METADATA_KEY = "mpcompile.sparsity"
UNSTRUCTURED = "unstructured"  # the pattern of a mask that is not N:M
# Operators that a weight may pass between its initializer and its product.
CONSTANT_STEPS = ("Cast", "Identity", "Transpose", "QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True, slots=True)
class FileWeight:
    """A constant weight of a Conv, Gemm or MatMul node of the file, in PyTorch's layout.

    Attributes:
        node: name of the node that multiplies by the weight.
        op: its operator.
        initializer: name of the stored tensor.
        axis: the axis of the input channels, and so of the N:M groups, in the initializer as stored.
        values: the weight (out, in_, *taps), in the stored type. A weight behind DequantizeLinear is given as stored,
            less its zero point: it is zero where the weight is.
        scopes: qualified names of the modules that contain the node, as the exporter recorded them.
    """

    node: str
    op: str
    initializer: str
    axis: int
    values: NDArray[Any]
    scopes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ProvenMask:
    """A planned mask that was verified in the file.

    Attributes:
        layer: qualified name of the masked layer.
        initializer: name of its weight in the file.
        nodes: names of the nodes that multiply by the weight.
        op: the operator of the node that was checked: Conv, Gemm or MatMul.
        axis: the axis of the N:M groups in the initializer as stored.
        pattern: such as `2:4`; `unstructured` for a mask that is not N:M.
        group_size: M; 1 for an unstructured mask.
        zeros: the number of zeros in the weight.
        size: the number of values in the weight.
    """

    layer: str
    initializer: str
    nodes: tuple[str, ...]
    op: str
    axis: int
    pattern: str
    group_size: int
    zeros: int
    size: int

    @property
    def nm(self) -> NM | None:
        """The N:M pattern; None for an unstructured mask."""
        return None if self.pattern == UNSTRUCTURED else NM.parse(self.pattern)


def file_weights(file: onnx.ModelProto) -> list[FileWeight]:
    """The constant weight of each Conv, Gemm and MatMul node in the file, one entry for each node."""
    constants = {tensor.name: tensor for tensor in file.graph.initializer}
    makers = {output: node for node in file.graph.node for output in node.output}
    found = []
    for node in file.graph.node:
        for initializer, axis, values in _weight_of(node, constants, makers):
            scopes = next((p.value for p in node.metadata_props if p.key == NAME_SCOPES), "[]")
            found.append(
                FileWeight(node.name, node.op_type, initializer, axis, values, tuple(ast.literal_eval(scopes)))
            )
    return found


def _weight_of(
    node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto], makers: Mapping[str, onnx.NodeProto]
) -> Iterator[tuple[str, int, NDArray[Any]]]:
    """Yields at most one weight: its initializer, the axis of its input channels, its values as (out, in_, *taps)."""
    if node.op_type not in ("Conv", "Gemm", "MatMul"):
        return
    second = _constant(node.input[1], constants, makers)
    if second is not None:
        name, values, axes = second
        if node.op_type == "Conv":
            yield name, axes[1], values
        elif values.ndim == 2:
            transposed = any(a.name == "transB" and a.i for a in node.attribute)
            yield (name, axes[1], values) if transposed else (name, axes[0], values.T)
    elif node.op_type == "MatMul" and (first := _constant(node.input[0], constants, makers)) is not None:
        name, values, axes = first
        if values.ndim == 2:
            yield name, axes[1], values


def _constant(
    name: str, constants: Mapping[str, onnx.TensorProto], makers: Mapping[str, onnx.NodeProto]
) -> tuple[str, NDArray[Any], tuple[int, ...]] | None:
    """A constant input: its initializer, its values as the node reads them, and the stored axis of each of their axes.

    None if the input is not constant.
    """
    if name in constants:
        values = numpy_helper.to_array(constants[name])
        return name, values, tuple(range(values.ndim))
    maker = makers.get(name)
    if maker is None or maker.op_type not in CONSTANT_STEPS:
        return None
    inner = _constant(maker.input[0], constants, makers)
    if inner is not None and maker.op_type == "DequantizeLinear" and len(maker.input) > 2:
        return _less_zero_point(maker, inner, constants)
    if inner is None or maker.op_type != "Transpose":
        return inner
    stored, values, axes = inner
    given = next((tuple(a.ints) for a in maker.attribute if a.name == "perm"), tuple(reversed(range(values.ndim))))
    return stored, values.transpose(given), tuple(axes[i] for i in given)


def _less_zero_point(
    maker: onnx.NodeProto,
    inner: tuple[str, NDArray[Any], tuple[int, ...]],
    constants: Mapping[str, onnx.TensorProto],
) -> tuple[str, NDArray[Any], tuple[int, ...]] | None:
    """The input of a DequantizeLinear less its zero point; None if the zero point is not constant."""
    name, values, axes = inner
    if maker.input[2] not in constants:
        return None
    zero_point = numpy_helper.to_array(constants[maker.input[2]])
    if not np.asarray(zero_point != 0).any():
        return inner
    axis = next((a.i for a in maker.attribute if a.name == "axis"), 1) % values.ndim
    shape = [1] * values.ndim
    shape[axis] = zero_point.size
    return name, values.astype(np.float32) - zero_point.astype(np.float32).reshape(shape), axes


def match_layers(
    file: onnx.ModelProto, plans: Mapping[str, LayerPlan], weights: Mapping[str, torch.Tensor]
) -> dict[str, list[FileWeight]]:
    """The weights in the file of each masked or quantised layer, by layer name; an empty list if none was found.

    `plans` are the plans of the layers, `weights` the exported state dict. A weight is matched, in this order, by the
    metadata that mpcompile wrote; the initializer's name (convolutions keep it); the node's scope (a Linear keeps its
    module's name there); equal values (a weight that is used without calling its module, such as BEiT's qkv, keeps
    neither).
    """
    found = file_weights(file)
    noted = layers_in_metadata(file)
    matches: dict[str, list[FileWeight]] = {}
    for name, plan in plans.items():
        if plan.mask is None and plan.scale is None:
            continue
        weight = weights[f"{name}.weight"]
        same_shape = [w for w in found if w.values.shape == tuple(weight.shape)]
        matches[name] = (
            [w for w in found if name in noted.get(w.initializer, ())]
            or [w for w in same_shape if w.initializer == f"{name}.weight"]
            or [w for w in same_shape if name in w.scopes]
            or [w for w in same_shape if _same_numbers(w.values, weight, plan.scale)]
        )
    return matches


def layers_in_metadata(file: onnx.ModelProto) -> dict[str, list[str]]:
    """Layer names of each initializer in the file's metadata; several if layers are tied or equal. Empty without it."""
    text = next((p.value for p in file.metadata_props if p.key == METADATA_KEY), "{}")
    return {initializer: row["layers"] for initializer, row in json.loads(text).items()}


def _same_numbers(values: NDArray[Any], weight: torch.Tensor, scale: torch.Tensor | None) -> bool:
    """Whether a weight of the file equals the layer's weight, rounded to the type of the file.

    An 8-bit weight is compared in steps of the layer's `scale` (out,).
    """
    if scale is not None and values.dtype.itemsize == 1:
        weight = weight / scale.reshape(-1, *[1] * (weight.ndim - 1))
        weight = weight.round() if values.dtype == np.int8 else weight
    stored: NDArray[Any] = weight.detach().cpu().numpy().astype(values.dtype)
    return bool(np.array_equal(values, stored))


def verify_masks(
    file: onnx.ModelProto, plans: Mapping[str, LayerPlan], weights: Mapping[str, torch.Tensor]
) -> tuple[ProvenMask, ...]:
    """A ProvenMask for each planned mask; `weights` is the exported state dict.

    Raises MaskError for the first mask that is missing or violated in the file.
    """
    rows: list[ProvenMask] = []
    for name, found in match_layers(file, {n: p for n, p in plans.items() if p.mask is not None}, weights).items():
        if not found:
            raise MaskError(f"{name}: its mask was lost in the export; the ONNX file has no weight of this layer")
        rows.extend(verify_mask(name, plans[name], weight) for weight in found)
    users: dict[str, tuple[str, ...]] = {}  # an initializer that several nodes use gives one row
    for weight in file_weights(file):
        users[weight.initializer] = (*users.get(weight.initializer, ()), weight.node)
    return tuple(dict.fromkeys(replace(row, nodes=users[row.initializer]) for row in rows))


def _completed(kept: torch.Tensor, mask: torch.Tensor, pattern: NM) -> torch.Tensor:
    """The weights that are not zero, and those that the mask keeps and that are zero, as far as the pattern needs them.

    Kept weights may be rounded to zero. Rows that share a pattern keep what one of them does. A row that takes its
    pattern from a vocabulary keeps what the mask does, which was found to contain the weights that are not zero.
    """
    if pattern.vocabulary:
        return mask
    if kept.shape[0] % pattern.rows:
        return kept
    blocks = kept.reshape(-1, pattern.rows, *kept.shape[1:])
    return blocks.any(1, keepdim=True).expand_as(blocks).reshape(kept.shape)


def verify_mask(name: str, plan: LayerPlan, weight: FileWeight) -> ProvenMask:
    """The ProvenMask of one weight of the file. Raises MaskError if the weight violates the plan's mask."""
    assert plan.mask is not None
    where = f"{weight.initializer} (axis {weight.axis}, {weight.op})"
    if tuple(weight.values.shape) != tuple(plan.mask.shape):
        raise MaskError(f"{name}: {where} is {weight.values.shape}, the mask {tuple(plan.mask.shape)}")
    kept = torch.from_numpy(np.asarray(weight.values != 0))
    filled = int((kept & ~plan.mask).sum())
    if filled:
        raise MaskError(f"{name}: {filled} weights that the mask zeroes are not zero in {where} of the ONNX file")
    pattern = plan.pattern
    if pattern is not None and (broken := pattern_violation(_completed(kept, plan.mask, pattern), pattern)):
        raise MaskError(f"{name}: {where} is not {pattern}: {broken}")
    return ProvenMask(
        layer=name,
        initializer=weight.initializer,
        nodes=(weight.node,),
        op=weight.op,
        axis=weight.axis,
        pattern=str(plan.pattern) if plan.pattern else UNSTRUCTURED,
        group_size=plan.pattern.of if plan.pattern else 1,
        zeros=int(kept.numel() - kept.sum()),
        size=kept.numel(),
    )
