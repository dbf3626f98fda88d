"""Models quantised by hand, without the pass: quantizers before layers, weights rounded to the nearest step.

Their weights, and those of the pass with the lanes LANES, are exact in ONNX Runtime's 8-bit kernels on this processor.
"""

import copy
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import nn

from mpcompile.frontend.capture import capture
from mpcompile.ir.model import Model
from mpcompile.ir.quantization import ActivationType, Quantizer
from mpcompile.passes.quantize.layer_weight import Lanes
from mpcompile.runtimes.ort.int8 import saturates
from mpcompile.testing import tiny_source

# ONNX Runtime adds pairs of products in 16 bits on x86 without VNNI: 2 × 255 × 64 fits there, 2 × 255 × 127 does not.
LANES: Lanes = "pairs" if saturates() else "none"
LARGEST = {**dict.fromkeys(("u8", "s8"), 64 if saturates() else 127), "fp8": 448}


class Normalized(nn.Module):
    """Convolutions with batch normalizations whose weights are positive, negative and zero."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.a, self.norm1 = nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(32)
        self.b, self.norm2 = nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 10)
        for norm in (self.norm0, self.norm1, self.norm2):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
            norm.running_mean = torch.randn(norm.num_features) / 4
            norm.running_var = torch.rand(norm.num_features) + 0.5
        with torch.no_grad():
            self.norm1.weight[::3] *= -1
            self.norm2.weight[::2] *= -1
            self.norm2.weight[1] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm0(self.stem(x)).relu()
        x = self.norm1(self.a(x)).relu()
        x = (x + self.norm2(self.b(x))).relu()
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def normalized() -> Model:
    """A captured Normalized with random weights."""
    torch.manual_seed(0)
    return capture(Normalized().eval(), tiny_source())


def quantised_by_hand(
    model: Model, layers: Collection[str], kind: ActivationType = "u8", bound: float = 4.0, largest: int | None = None
) -> Model:
    """The model with a quantizer of the range −bound to bound before each of these layers, and 8-bit weights.

    `largest` is the integer of the largest weight of each row; LARGEST by default.
    """
    graph = copy.deepcopy(model.graph)
    done: dict[object, object] = {}
    for node in [n for n in graph.graph.nodes if n.op == "call_module" and n.target in layers]:
        source = node.args[0]
        if source not in done:
            name = f"quantizer_{len(done)}"
            quantizer = Quantizer(kind)
            quantizer.set_range(-bound, bound)
            graph.add_submodule(name, quantizer)
            with graph.graph.inserting_after(source):
                done[source] = graph.graph.call_module(name, (source,))
        node.replace_input_with(source, done[source])
    graph.recompile()
    result = replace(model, graph=graph)
    return result.with_plan(
        {
            name: replace(model.plan_of(name), scale=_rounded(result, name, kind, largest or LARGEST[kind]))
            for name in layers
        }
    )


@torch.no_grad()
def _rounded(model: Model, name: str, kind: ActivationType, largest: int) -> torch.Tensor:
    """Rounds a layer's weight to its grid in place and returns the scale of each row."""
    weight = model.layer(name).weight
    scale = (weight.flatten(1).abs().amax(1) / largest).clamp_min(1e-12)
    step = scale.reshape(-1, *[1] * (weight.ndim - 1))
    ratio = weight / step
    weight.copy_((ratio.to(torch.float8_e4m3fn).to(ratio.dtype) if kind == "fp8" else ratio.round()) * step)
    return scale
