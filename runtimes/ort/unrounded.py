"""Compares an 8-bit file with its graph without the rounding of activations.

With it, file and graph may differ by as much as quantisation shifts the outputs (mpcompile/ir/parity.py), which could
hide a wrong weight. Without it, what remains is the order of sums, so that weights, biases and all else can be checked
closely. The grids of the activations are compared number by number.
"""

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from mpcompile.errors import ParityError
from mpcompile.export.onnx_export import Lowered
from mpcompile.ir.batch import primary
from mpcompile.ir.parity import UNROUNDED, relative_difference
from mpcompile.ir.quantization import quantizers, without_rounding
from mpcompile.runtimes.ort.session import session_on


def require_unrounded_parity(lowered: Lowered, images: NDArray[np.float32]) -> float:
    """The relative difference of file and graph on images (b, c, h, w), both without the rounding of activations.

    Raises ParityError if it exceeds the tolerance, or if an activation's scale or zero point differs in the file.
    """
    file = onnx.load(lowered.onnx)
    _require_grids(file, lowered)
    _drop_activation_rounding(file)
    with torch.no_grad():
        expected = primary(without_rounding(lowered.model.graph)(torch.from_numpy(images))).numpy()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / lowered.onnx.name
        onnx.save_model(file, path, save_as_external_data=True)
        found = session_on(path, kernels_8_bit=False)(images)
    difference = relative_difference(expected, found)
    if difference > UNROUNDED:
        raise ParityError(
            f"{lowered.onnx.name}: even without the rounding of activations the outputs differ by {difference:.1e} of "
            f"the largest output; {UNROUNDED:.0e} is allowed; nothing was written"
        )
    return difference


def _require_grids(file: onnx.ModelProto, lowered: Lowered) -> None:
    """Raises ParityError unless the scales and zero points of the file's activations are those of the quantizers."""
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in file.graph.initializer}
    modules = quantizers(lowered.model.graph)
    used = (modules[str(node.target)] for node in lowered.model.graph.graph.nodes if node.target in modules)
    expected = Counter((float(q.scale), float(q.zero_point)) for q in used if q.calibrated)
    steps = (node for node in file.graph.node if node.op_type == "QuantizeLinear")
    found = Counter((float(stored[node.input[1]]), float(stored[node.input[2]])) for node in steps)
    if expected != found:
        raise ParityError(
            f"{lowered.onnx.name}: {(expected - found).total()} of {expected.total()} activations have another scale "
            "or zero point in the file than in the graph; nothing was written"
        )


def _drop_activation_rounding(file: onnx.ModelProto) -> None:
    """Connects the readers of each DequantizeLinear behind a QuantizeLinear with the input of the latter, in place."""
    makers = {output: node for node in file.graph.node for output in node.output}
    replaced: dict[str, str] = {}
    for node in file.graph.node:
        maker = makers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if maker is not None and maker.op_type == "QuantizeLinear":
            source = maker.input[0]
            replaced[node.output[0]] = replaced.get(source, source)
    for node in file.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = replaced.get(name, name)
    used = {name for node in file.graph.node for name in node.input} | {output.name for output in file.graph.output}
    kept = [node for node in file.graph.node if node.op_type not in ("QuantizeLinear", "DequantizeLinear")
            or used & set(node.output)]  # fmt: skip
    used = {name for node in kept for name in node.input} | {output.name for output in file.graph.output}
    kept = [node for node in kept if node.op_type != "QuantizeLinear" or node.output[0] in used]
    del file.graph.node[:]
    file.graph.node.extend(kept)
