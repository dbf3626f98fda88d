"""Quantizer: a module in a graph that rounds an activation to 8 bits, as the ONNX pair Quantize/DequantizeLinear does.

An activation x is stored as q = clamp(round(x / s) + z) and read back as s · (q − z), with one scale s > 0 and one zero
point z for the whole tensor. Three types: `u8` (0 to 255, any zero point), `s8` (−128 to 127, zero point 0) and `fp8`
(E4M3, zero point 0; q = x / s rounded to 4 significant bits). Rounding is half to even, on the quotient, as ONNX
specifies it. So a graph with quantizers computes what its ONNX file computes, up to the order of floating-point sums.

Weights have no quantizer. The quantize pass rounds them in place to scale × integer (`LayerPlan.scale`), and the export
recovers the integers.
"""

import copy
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, fx, nn

from mpcompile.errors import PassError

ActivationType = Literal["u8", "s8", "fp8"]
STORAGE = {"u8": torch.uint8, "s8": torch.int8, "fp8": torch.float8_e4m3fn}
RANGE = {torch.uint8: (0, 255), torch.int8: (-128, 127)}  # of integers, to which QuantizeLinear saturates
LARGEST_FP8 = 448.0  # of E4M3
LARGEST_END = 2.0**126  # of a range, so that its width, and products with a rounded scale, are float32 numbers


@torch.library.custom_op("mpcompile::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The values of x after quantisation; shaped and typed like x.

    `scale` and `zero_point` are scalars; the dtype of `zero_point` is the stored type (STORAGE). The gradient is 1, as
    if nothing were rounded (straight-through estimator).
    """
    quotient = x / scale
    if zero_point.dtype == torch.float8_e4m3fn:
        return quotient.clamp(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn).to(x.dtype) * scale
    low, high = RANGE[zero_point.dtype]
    shift = zero_point.to(x.dtype)
    return ((quotient.round() + shift).clamp(low, high) - shift) * scale


@fake_quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.empty_like(x)


def _straight_through(ctx: object, gradient: Tensor) -> tuple[Tensor, None, None]:
    return gradient, None, None


fake_quantize.register_autograd(_straight_through)


class Quantizer(nn.Module):
    """Rounds an activation to 8 bits; until `set_range` has been called, it returns its input unchanged."""

    scale: Float[Tensor, ""]
    zero_point: Shaped[Tensor, ""]

    def __init__(self, kind: ActivationType) -> None:
        super().__init__()
        self.kind: ActivationType = kind
        self.calibrated = False
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero_point", torch.zeros((), dtype=STORAGE[kind]))

    def set_range(self, low: float, high: float) -> None:
        """Sets the grid that covers low to high; zero is always represented exactly.

        `u8` covers the range with 255 steps, `s8` and `fp8` cover −m to m with m = max(−low, high). If the scale is no
        normal float32 number (an activation that is always 0, or nearly), it is 1.

        Raises PassError if an end of the range is not finite, or beyond ±LARGEST_END.
        """
        if not (abs(low) <= LARGEST_END and abs(high) <= LARGEST_END):
            raise PassError(
                f"an activation ranges from {low:.3g} to {high:.3g}; 8 bits need finite values up to {LARGEST_END:.2g}"
            )
        low, high = min(low, 0.0), max(high, 0.0)
        if self.kind == "u8":
            scale = (high - low) / 255
        else:
            scale = max(-low, high) / (LARGEST_FP8 if self.kind == "fp8" else 127)
        if scale < torch.finfo(torch.float32).tiny:
            scale, low = 1.0, 0.0
        zero_point = round(-low / scale) if self.kind == "u8" else 0
        self.scale = torch.tensor(scale, device=self.scale.device, dtype=torch.float32)
        self.zero_point = torch.tensor(float(zero_point), device=self.scale.device).to(STORAGE[self.kind])
        self.calibrated = True

    def forward(self, x: Tensor) -> Tensor:
        """The rounded activation, shaped like x."""
        if not self.calibrated:
            return x
        result: Tensor = fake_quantize(x, self.scale.to(x.dtype), self.zero_point)
        return result

    def extra_repr(self) -> str:
        """The stored type, and whether a range was set; part of the hash of a model's structure."""
        return f"{self.kind}, calibrated={self.calibrated}"


def without_rounding(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph whose quantizers return their inputs unchanged."""
    result = copy.deepcopy(graph)
    for quantizer in quantizers(result).values():
        quantizer.calibrated = False
    return result


def quantizers(graph: fx.GraphModule) -> dict[str, Quantizer]:
    """The quantizers of a graph by qualified name."""
    return {name: module for name, module in graph.named_modules() if isinstance(module, Quantizer)}
