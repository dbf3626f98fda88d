"""Quantises the masked products of a file by rounding to nearest, for timings of models with random weights.

Accuracy does not matter there, and the pass `quantize` fits weights for minutes. Activations range from their minimum
to their maximum on the images. Where 16-bit lanes saturate, a row's scale is the least at which its lanes fit, as in
the pass.
"""

from collections.abc import Collection

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from mpcompile.export.mask_check import file_weights
from mpcompile.passes.quantize.lane_rule import PAIRS, LaneRule, block_rule, most_kept, safe_scale
from mpcompile.runtimes.native.microbenchmark import session
from mpcompile.runtimes.native.packing import shared_rows


def quantised(
    file: onnx.ModelProto, images: NDArray[np.float32], layers: Collection[str], saturating: bool
) -> onnx.ModelProto:
    """Returns the file with u8 activations and s8 weights in the MatMul nodes of these layers (module names)."""
    result = onnx.ModelProto()
    result.CopyFrom(file)
    graph = result.graph
    weights = {w.node: w for w in file_weights(file) if w.op == "MatMul" and any(scope in layers for scope in w.scopes)}
    nodes = [node for node in graph.node if node.name in weights]
    inputs = sorted({node.input[0] for node in nodes})
    probe = onnx.ModelProto()
    probe.CopyFrom(file)
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inputs)
    ranges = dict(zip(inputs, session(probe, None, None).run(inputs, {graph.input[0].name: images}), strict=True))
    stored = {tensor.name: tensor for tensor in graph.initializer}
    before: dict[str, list[onnx.NodeProto]] = {}
    for name in inputs:
        low, high = min(float(ranges[name].min()), 0.0), max(float(ranges[name].max()), 0.0)
        scale = np.float32(max((high - low) / 255, 1e-6))
        graph.initializer.extend(
            [
                numpy_helper.from_array(np.array(scale, np.float32), f"{name}.scale"),
                numpy_helper.from_array(np.array(round(-low / float(scale)), np.uint8), f"{name}.zero"),
            ]
        )
        before[name] = [
            helper.make_node(op, [source, f"{name}.scale", f"{name}.zero"], [target], name=target)
            for op, source, target in (
                ("QuantizeLinear", name, f"{name}.u8"),
                ("DequantizeLinear", f"{name}.u8", f"{name}.q"),
            )
        ]
    ordered: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.name in weights:
            ordered += before.pop(node.input[0], [])
            weight = numpy_helper.to_array(stored[node.input[1]])
            integers, scales = rounded(weight, saturating)
            name = node.input[1]
            stored[name].CopyFrom(numpy_helper.from_array(integers, name))
            graph.initializer.append(numpy_helper.from_array(scales, f"{name}.scale"))
            graph.initializer.append(numpy_helper.from_array(np.zeros(len(scales), np.int8), f"{name}.zero"))
            ordered.append(
                helper.make_node(
                    "DequantizeLinear", [name, f"{name}.scale", f"{name}.zero"], [f"{name}.q"], name=f"{name}.q", axis=1
                )
            )
            node.input[0], node.input[1] = f"{node.input[0]}.q", f"{name}.q"
        ordered.append(node)
    del graph.node[:]
    graph.node.extend(ordered)
    return result


def rounded(weight: NDArray[np.float32], saturating: bool) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Returns integers (columns, rows) and scales (rows) of a weight (columns, rows).

    With `saturating`, no 16-bit lane of the int8 kernel saturates.
    """
    rows = torch.from_numpy(np.ascontiguousarray(weight.T))
    if saturating:
        kept = rows != 0
        rule: LaneRule = block_rule(kept, shared_rows(kept.numpy())) if most_kept(kept) <= 8 else PAIRS
        scale = safe_scale(rows, rule).float()
    else:
        scale = rows.abs().amax(1) / 127
    scale = scale.clamp_min(1e-8)
    integers = (rows / scale[:, None]).round().to(torch.int8)
    return integers.numpy().T.copy(), scale.numpy()
