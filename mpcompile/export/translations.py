"""ONNX operators for torch operators that torch.onnx lacks, or writes for some inputs only.

`scaled_dot_product_attention`: torch.onnx takes 4 axes only, and in rows of a boolean mask without any `True` it gives
the mean of the values, where torch gives zeros. Attention with 4 axes and without a boolean mask is left to torch.onnx.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def translations(opset: int) -> dict[Any, Callable[..., Any]]:
    """The functions that write operators, for `custom_translation_table` of torch.onnx.export."""
    return {
        torch.ops.aten.sort.stable: _sorted_stably,
        torch.ops.aten.scaled_dot_product_attention.default: _attention,
        torch.ops.mpcompile.fake_quantize.default: _rounded_21 if opset >= 21 else _rounded_20,
    }


def _sorted_stably(values: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """torch.sort(stable=True), which the exporter lacks, as a TopK over all values: TopK breaks ties by index."""
    from onnxscript import opset18

    count: Any = opset18.Constant(value_ints=[values.shape[dim]])
    return opset18.TopK(values, count, axis=dim, largest=int(descending), sorted=1)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(q · kᵀ · scale + mask) · v, with zeros in the rows whose mask has no `True`."""
    from onnx_ir import DataType
    from onnxscript import opset18 as op
    from onnxscript.function_libs.torch_lib.ops.nn import aten_scaled_dot_product_attention

    boolean = attn_mask is not None and attn_mask.dtype == DataType.BOOL
    four_axes = all(len(one.shape) == 4 for one in (query, key, value))
    if dropout_p or enable_gqa or (four_axes and not boolean):
        return aten_scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if is_causal:
        rows, columns = int(query.shape[-2]), int(key.shape[-2])
        attn_mask, boolean = _constant(np.tri(rows, columns, dtype=bool), DataType.BOOL), True
    kind = query.dtype
    # Both factors by the root of the scale, in float32, as torch and torch.onnx do.
    root = np.sqrt(np.float32(1) / np.sqrt(np.float32(query.shape[-1])) if scale is None else np.float32(scale))
    factor = _constant(root, kind)
    axes = list(range(len(key.shape)))
    swapped = op.Transpose(key, perm=[*axes[:-2], axes[-1], axes[-2]])
    scores: Any = op.MatMul(op.Mul(query, factor), op.Mul(swapped, factor))
    if attn_mask is None:
        return op.MatMul(op.Softmax(scores, axis=-1), value)
    zero = _constant(0.0, kind)
    bias: Any = op.Where(attn_mask, zero, _constant(kind.min, kind)) if boolean else attn_mask
    weights: Any = op.Softmax(op.Add(scores, bias), axis=-1)
    if boolean:
        weights = op.Where(attn_mask, weights, zero)
    return op.MatMul(weights, value)


def _constant(value: Any, kind: Any) -> Any:
    """A constant of this ONNX type."""
    import onnx_ir
    from onnxscript import opset18

    tensor: Any = onnx_ir.tensor(value, dtype=kind)
    return opset18.Constant(value=tensor)


def _rounded_20(x: Any, scale: Any, zero_point: Any) -> Any:
    """A Quantizer as a pair of QuantizeLinear and DequantizeLinear."""
    from onnxscript import opset20

    return opset20.DequantizeLinear(opset20.QuantizeLinear(x, scale, zero_point), scale, zero_point)


def _rounded_21(x: Any, scale: Any, zero_point: Any) -> Any:
    """A Quantizer as a pair of QuantizeLinear and DequantizeLinear of opset 21."""
    from onnxscript import opset21

    return opset21.DequantizeLinear(opset21.QuantizeLinear(x, scale, zero_point), scale, zero_point)
