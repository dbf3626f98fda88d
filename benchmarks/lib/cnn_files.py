"""Untrained CNNs in int8 as the pass `quantize` places the quantizers, with masks by magnitude, for timings.

The pass fits weights for minutes; here they are rounded to nearest, and activations range from their minimum to their
maximum on two images. Where 16-bit lanes saturate, a row's scale is the least at which its lanes fit, as in the pass.
"""

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from lib.nearest_int8 import rounded
from lib.untrained_cnns import pixels_of, untrained
from mpcompile.export.onnx_export import lower
from mpcompile.frontend.capture import capture
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.ir.quantization import Quantizer
from mpcompile.ir.source import Source
from mpcompile.ir.weight_groups import flat
from mpcompile.passes.nm_mask.selection import nm_mask
from mpcompile.passes.quantize.placement import insert, sites
from mpcompile.passes.quantize.policy import quantizable
from mpcompile.runtimes.native import int8_rewrite
from mpcompile.runtimes.native.int8_selection import inspected


def untrained_cnn(name: str) -> Model:
    """Returns a CNN with random weights, captured."""
    size = pixels_of(name)
    return capture(untrained(name), Source(name, "", name), torch.randn(1, 3, size, size))


@dataclass(frozen=True)
class Quantised:
    """A quantised model, and the sparse layers in it: all quantised ones without groups."""

    model: Model
    masked: tuple[str, ...]


@torch.no_grad()
def in_int8(model: Model, pattern: NM | None, images: torch.Tensor, saturating: bool) -> Quantised:
    """Returns the model in int8, with the layers masked by magnitude whose number of channels the pattern divides."""
    layers = [name for name, reason in quantizable(model).items() if reason is None]
    graph = copy.deepcopy(model.graph)
    result, masked = replace(model, graph=graph), []
    names = insert(graph, sites(result, layers, "convolutions"), "u8")
    scales = {}
    for name in layers:
        weight = result.layer(name).weight
        if pattern is not None and weight.shape[1] % pattern.of == 0 and len(weight) % pattern.rows == 0:
            weight.mul_(nm_mask(weight.abs(), pattern))
            masked.append(name)
        # (rows, taps · channels), in the order of the kernel's columns
        integers, steps = rounded(np.ascontiguousarray(flat(weight).numpy().T), saturating)
        scales[name] = torch.from_numpy(steps)
        rows = torch.from_numpy(integers.T.astype(np.float32)) * scales[name][:, None]
        weight.copy_(rows.reshape(len(weight), *weight.shape[2:], weight.shape[1]).movedim(-1, 1))
    ranges: dict[str, tuple[float, float]] = {}
    hooks = [
        graph.get_submodule(name).register_forward_pre_hook(
            lambda _, given, name=name: ranges.update({name: (float(given[0].min()), float(given[0].max()))})
        )
        for name in names
    ]
    graph(images)
    for hook in hooks:
        hook.remove()
    for name, (low, high) in ranges.items():
        quantizer = graph.get_submodule(name)
        assert isinstance(quantizer, Quantizer)
        quantizer.set_range(low, high)
    result = result.with_plan({name: replace(model.plan_of(name), scale=scale) for name, scale in scales.items()})
    return Quantised(result, tuple(masked))


def standard_file(quantised: Quantised, path: Path) -> onnx.ModelProto:
    """Writes a quantised model to a file, as `--precision int8 --target ort` does, and returns it."""
    return onnx.load(lower(quantised.model, path, precision="int8").onnx)


def native_file(standard: onnx.ModelProto, images: NDArray[np.float32]) -> tuple[onnx.ModelProto, int]:
    """Returns the file with every native int8 operator that it can have, and the number of convolutions among them."""
    found = inspected(standard, images)
    made = int8_rewrite.replace(standard, found.products, found.shapes, convolutions=found.convolutions)
    return made, len(found.convolutions)
