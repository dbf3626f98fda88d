"""The quantised weight of one layer: refitted to the dense outputs and rounded, and the bias that its mean needs."""

from typing import Literal

import torch
from torch import Tensor

from mpcompile.ir.model import LayerPlan, Model
from mpcompile.ir.quantization import LARGEST_FP8, ActivationType, Quantizer
from mpcompile.ir.weight_groups import flat, unflat
from mpcompile.passes.quantize.lane_rule import BLOCK, PAIRS, TOP, LaneRule, block_rule, float32_above, most_kept
from mpcompile.passes.quantize.placement import quantizers_before
from mpcompile.passes.quantize.rounding import rounded, row_scales
from mpcompile.passes.reconstruct.cross_validation import refit_problem
from mpcompile.passes.reconstruct.layerwise import LayerStep
from mpcompile.passes.reconstruct.least_squares import refit

Lanes = Literal["none", "pairs", "blocks"]
LARGEST_BIAS = 2.0**30  # of the int32 in which files store biases; half the largest, since the refit moves biases


def quantised_weight(
    model: Model, step: LayerStep, kind: ActivationType, lanes: Lanes, damping: float | None, *, refitted: bool
) -> dict[str, Tensor]:
    """The tensors to write for one weight: `weight`, `scale`, `rounding_error`, and `bias` if the mean is free.

    Args:
        model: the graph being quantised; the quantizers before the layer have their ranges.
        step: the weight and the moments of its inputs, quantised.
        kind: the stored type of activations; with fp8, weights are E4M3 values.
        lanes: as in `Quantize`.
        damping: λ of the ridge term, relative to the mean second moment of the inputs; None to choose it for the layer.
        refitted: whether the weights are refitted before they are rounded.
    """
    own, plan = flat(step.layer.weight), model.plan_of(step.weight.names[0])
    fit = refit_problem(step, damping)
    problem, fitted = fit.reported, fit.solved
    mask = torch.ones_like(own, dtype=torch.bool) if plan.mask is None else flat(plan.mask)
    best, least = refit(fitted, mask) if refitted else own.double(), _smallest_scale(model, step)
    if kind == "fp8":
        scale = float32_above(row_scales(best, least) * (TOP / LARGEST_FP8))
        stored = (best / scale[:, None]).float().to(torch.float8_e4m3fn)
    else:
        found = rounded(fitted, mask, best, least=least, rule=_lane_rule(lanes, mask, plan, step.layer.weight.ndim > 2))
        stored, scale = found.integers, found.scale
    weight = stored.double() * scale.double()[:, None]
    power, shape, dtype = problem.power.sum(), step.layer.weight.shape, step.layer.weight.dtype
    result = {
        "weight": unflat(weight, shape).to(dtype),
        "scale": scale.to(dtype),
        "rounding_error": problem.error(weight).sum() / power if power > 0 else torch.zeros(()),
    }
    if step.weight.centred:
        result["bias"] = problem.bias(weight)
    return result


def _smallest_scale(model: Model, step: LayerStep) -> Tensor | float:
    """The weight scale of each output channel at which the bias is an int32 multiple of input scale × weight scale.

    The biases are those of all layers that share the weight. Inputs of a later use have no scale yet and do not count.
    """
    biases = [layer.bias for layer in map(model.layer, step.weight.names) if layer.bias is not None]
    before = [model.graph.get_submodule(name) for name in quantizers_before(model.graph, step.weight.names)]
    inputs = [float(module.scale) for module in before if isinstance(module, Quantizer) and module.calibrated]
    if not biases or not inputs:
        return 0.0
    return torch.stack([bias.detach().double().abs() for bias in biases]).amax(0) / (min(inputs) * LARGEST_BIAS)


def _lane_rule(lanes: Lanes, mask: Tensor, plan: LayerPlan, convolution: bool) -> LaneRule | None:
    """The lanes of a layer that must not saturate; None for none.

    The kernel that skips zeros multiplies matrices only, so that convolutions need the lanes of ONNX Runtime.
    """
    if lanes == "none":
        return None
    of = plan.pattern.of if plan.pattern is not None else 0
    if lanes == "blocks" and not convolution and of and BLOCK % of == 0 and most_kept(mask) <= 8:
        return block_rule(mask, plan.pattern.rows if plan.pattern is not None else 1)
    return PAIRS
