"""Quantises weights and activations to 8 bits, jointly with the masks: rounding is fitted to the dense model.

For a layer with inputs x, one scale s per output channel and integers q, the stored weight is W = s q. An integer is 0
wherever the mask is. The run goes layer by layer (passes/reconstruct/layerwise.py): when it reaches a layer, all layers
before it are masked and quantised, and its input is the one that the runtime will see. Then

1. the range of its input quantizer is set from the inputs on the calibration images (passes/quantize/observers.py);
2. its kept weights are refitted to the outputs of the dense model, by least squares;
3. they are rounded, with the second moments of the inputs (passes/quantize/rounding.py);
4. the bias, or the batch normalization after the layer, takes up the change of the mean output.

Inputs of layers are quantised with one scale for the tensor. What else is quantised is decided in
passes/quantize/placement.py, which layers stay in floating point in passes/quantize/policy.py.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, fx

from mpcompile.analysis.activation_stats import DAMPING
from mpcompile.data.images import Data, Split
from mpcompile.errors import PassError, UsageError, on_layer
from mpcompile.ir.model import LayerPlan, Model
from mpcompile.ir.quantization import LARGEST_FP8, STORAGE, ActivationType, quantizers
from mpcompile.ir.weight_groups import flat, unflat
from mpcompile.passes.dense_comparison import outputs_of
from mpcompile.passes.quantize.observers import OBSERVERS, Range
from mpcompile.passes.quantize.placement import Outputs, insert, sites
from mpcompile.passes.quantize.policy import quantizable
from mpcompile.passes.reconstruct.layerwise import LayerStep, layerwise
from mpcompile.passes.reconstruct.least_squares import damped, moments_with_residual, refit
from mpcompile.passes.reconstruct.tied_weight import write
from mpcompile.pipeline.pass_manager import Effect

if TYPE_CHECKING:
    ObserverName = str
else:  # the values that a recipe accepts; type checkers cannot read a Literal from a table
    ObserverName = Literal[tuple(OBSERVERS)]

SAMPLED_VALUES = 1 << 18  # of an activation, for the range of its quantizer


@dataclass(frozen=True, slots=True)
class Quantize:
    """Quantises layers to 8 bits towards the dense model, and keeps their masks.

    Stems, output layers and layers whose weight is not used as it is stored stay in floating point, each with its
    reason in the plan.

    Args:
        activations: the stored type of activations: u8 (asymmetric, for CPUs), s8 (symmetric, for TensorRT) or fp8.
        outputs: whether the outputs of Linear layers are quantised too (`all`), or of convolutions only.
        observer: how the ranges of activations are set, a name in OBSERVERS. Default: the one that moves the logits of
            the validation images least.
        refit: whether the weights are refitted before they are rounded.
        damping: λ of the ridge term of the refit, relative to the mean second moment of the inputs.
        include: shell patterns over qualified names; layers to quantise that stay in floating point by default.
        exclude: shell patterns over qualified names; layers that stay in floating point. Wins over `include`.
    """

    name: ClassVar[str] = "quantize"
    effect: ClassVar[Effect] = Effect.LOSSY
    requires: ClassVar[tuple[str, ...]] = ()

    activations: ActivationType = "u8"
    outputs: Outputs = "convolutions"
    observer: ObserverName | None = None
    refit: bool = True
    damping: float = DAMPING
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises UsageError if a value is out of range."""
        if self.observer is not None and self.observer not in OBSERVERS:
            raise UsageError(f"observer is {self.observer!r}; the observers are {', '.join(OBSERVERS)}")
        if not 0 < self.damping < float("inf"):
            raise UsageError(f"damping is {self.damping}; give a number above 0, as {DAMPING}")

    def require_inputs(self, model: Model, data: Data) -> None:
        """Raises PassError if there are no calibration images."""
        if not len(data.calibration):
            raise PassError("the ranges of activations are measured on calibration images; give --data")

    @torch.no_grad()
    def __call__(self, model: Model, data: Data) -> Model:
        """The quantised model. Each layer's plan has its weight scale, or the reason why it stays in floating point.

        Raises PassError if there are no calibration images, if no layer can be quantised, or if one already is.
        """
        self.require_inputs(model, data)
        if quantizers(model.graph):
            raise PassError("the model is already quantised; leave one of the two quantize passes out")
        reasons = quantizable(model, self.include, self.exclude)
        layers = [name for name, reason in reasons.items() if reason is None]
        if not layers:
            shown = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:3])
            raise PassError(f"no layer can be quantised ({shown or 'the model has no Linear and no Conv2d'})")
        check = data.validation if len(data.validation) else data.calibration
        reference = copy.deepcopy(_reference(model))
        places = sites(model, layers, self.outputs)
        names = insert(model.graph, places, self.activations)
        insert(reference, places, self.activations)
        expected = outputs_of(model.graph, check)
        observer, note = self._observer(model.graph, names, data.calibration, check, expected)
        plans = {name: replace(model.plan_of(name), unquantized=reason) for name, reason in reasons.items()}
        plans |= self._sweep(model, reference, data.calibration, layers, observer)
        return replace(model.with_plan(plans), notes=(*model.notes, note))

    def _observer(
        self, graph: fx.GraphModule, names: Sequence[str], images: Split, check: Split, expected: Tensor
    ) -> tuple[Callable[[Tensor], Range], str]:
        """The observer, and a note on the choice. Activations alone are quantised to choose it, on the float graph."""
        if self.activations == "fp8":  # its steps grow with the value: clipping gains nothing
            return OBSERVERS["min-max"], "activations in FP8, ranges by min-max"
        if self.observer is not None:
            return OBSERVERS[self.observer], f"ranges of activations by {self.observer}"
        samples = _samples(graph, names, images)
        shifts = {}
        for name, observer in OBSERVERS.items():
            trial = copy.deepcopy(graph)
            modules = quantizers(trial)
            for site, values in samples.items():
                modules[site].set_range(*_range(observer, values, self.activations))
            shifts[name] = float((outputs_of(trial, check) - expected).abs().flatten(1).amax(1).mean())
        best = min(shifts, key=shifts.__getitem__)
        others = ", ".join(f"{shift:.3g} by {name}" for name, shift in shifts.items() if name != best)
        note = f"ranges of activations by {best}: alone they shift the logits by {shifts[best]:.3g} ({others})"
        return OBSERVERS[best], note

    def _sweep(
        self,
        model: Model,
        reference: fx.GraphModule,
        images: Split,
        layers: Sequence[str],
        observer: Callable[[Tensor], Range],
    ) -> dict[str, LayerPlan]:
        """Quantises the layers in place, in order of execution. Returns their plans."""
        modules = quantizers(model.graph)

        def calibrate(name: str, batches: Sequence[Tensor]) -> None:
            modules[name].set_range(*_range(observer, _sampled(batches), self.activations))

        plans: dict[str, LayerPlan] = {}
        for step in layerwise(model, reference, images, layers, residual=self.refit, calibrate=calibrate):
            with on_layer(step.weight.names[0]):
                result = self._solve(model, step)
                write(step.weight, step.layer, result)
                for name in step.weight.names:
                    plans[name] = replace(
                        model.plan_of(name),
                        scale=result["scale"],
                        rounding_error=float(result["rounding_error"]),
                        unquantized=None,
                    )
            del step  # frees its moments before those of the next layer are collected
        return plans

    def _solve(self, model: Model, step: LayerStep) -> dict[str, Tensor]:
        """The tensors to write for one weight: `weight`, `scale`, `rounding_error`, and `bias` if the mean is free."""
        moments = moments_with_residual(step, self.damping)
        assert moments is not None
        own, plan = flat(step.layer.weight), model.plan_of(step.weight.names[0])
        problem = moments.problem(step.weight.centred)
        mask = torch.ones_like(own, dtype=torch.bool) if plan.mask is None else flat(plan.mask)
        fitted = damped(problem, own, self.damping)
        best = own.double() if not self.refit else refit(fitted, mask)
        scale, weight = _rounded(best, self.activations)
        power = problem.power.sum()
        shape = step.layer.weight.shape
        result = {
            "weight": unflat(weight, shape).to(step.layer.weight.dtype),
            "scale": scale.to(step.layer.weight.dtype),
            "rounding_error": problem.error(weight).sum() / power if power > 0 else torch.zeros(()),
        }
        if step.weight.centred:
            result["bias"] = problem.bias(weight)
        return result


def _rounded(weight: Tensor, kind: ActivationType) -> tuple[Tensor, Tensor]:
    """The scale of each row (out,) and the nearest weight (out, in_) on its grid: integers, or E4M3 values for fp8."""
    scale = (weight.abs().amax(1) / (LARGEST_FP8 if kind == "fp8" else 127)).clamp_min(1e-12)
    steps = weight / scale[:, None]
    numbers = steps.to(STORAGE["fp8"]).to(weight.dtype) if kind == "fp8" else steps.round()
    return scale, numbers * scale[:, None]


def _reference(model: Model) -> fx.GraphModule:
    """The graph whose outputs are the targets: the dense one, unless its nodes differ or training came after it."""
    if model.dense is None or model.epochs or not _same_nodes(model.graph, model.dense):
        return model.graph
    return model.dense


def _same_nodes(one: fx.GraphModule, other: fx.GraphModule) -> bool:
    """Whether two graphs have the same operations in the same order."""
    return [(n.op, str(n.target)) for n in one.graph.nodes] == [(n.op, str(n.target)) for n in other.graph.nodes]


def _samples(graph: fx.GraphModule, names: Sequence[str], images: Split) -> dict[str, Tensor]:
    """A sample of the inputs of each quantizer, in one run over all images."""
    modules, found = quantizers(graph), dict[str, list[Tensor]]()
    handles = [
        modules[name].register_forward_hook(
            lambda module, inputs, output, name=name: found.setdefault(name, []).append(_sampled(inputs, 1 << 14))
        )
        for name in names
    ]
    try:
        outputs_of(graph, images)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def _sampled(batches: Sequence[Tensor], count: int = SAMPLED_VALUES) -> Tensor:
    """About `count` values of these tensors at equal distances, and their extremes. Raises PassError if not finite."""
    each = max(1, count // len(batches))
    parts = []
    for batch in batches:
        values = batch.flatten()
        low, high = values.aminmax()
        parts += [values[:: max(1, len(values) // each)], low[None], high[None]]
    sample = torch.cat(parts)
    if not bool(sample.isfinite().all()):
        raise PassError("an activation on the calibration images is not finite")
    return sample


def _range(observer: Callable[[Tensor], Range], values: Tensor, kind: ActivationType) -> Range:
    """The range of an observer; for a symmetric type, that of the values and their negatives."""
    return observer(values if kind == "u8" else torch.cat([values, -values]))
