"""Quantises weights and activations to 8 bits, jointly with the masks: rounding is fitted to the dense model.

For a layer with inputs x, one scale s per output channel and integers q, the stored weight is W = s q. An integer is 0
wherever the mask is. The run goes layer by layer (passes/reconstruct/layerwise.py): when it reaches a layer, all layers
before it are masked and quantised, and its input is the one that the runtime will see. Then

1. the range of its input quantizer is set from the inputs on the calibration images (passes/quantize/observers.py);
2. its kept weights are refitted to the outputs of the dense model, by least squares, unless an earlier pass did so:
   a second fit to the same images costs accuracy on others (EfficientNet-Lite0 at 1:4: 75.0 % top-1, 76.1 % without);
3. they are rounded, with the second moments of the inputs (passes/quantize/rounding.py);
4. the bias, or the batch normalization after the layer, takes up the change of the mean output.

Inputs of layers are quantised with one scale for the tensor. What else is quantised is decided in
passes/quantize/placement.py, which layers stay in floating point in passes/quantize/policy.py.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from mpcompile.data.images import Data, Split
from mpcompile.errors import PassError, UsageError, on_layer
from mpcompile.ir.model import LayerPlan, Model
from mpcompile.ir.quantization import ActivationType, quantizers
from mpcompile.passes.dense_comparison import measured_on, outputs_of, same_nodes, shift_and_spread
from mpcompile.passes.quantize.calibration import Observer, best_observer, range_of, sample
from mpcompile.passes.quantize.layer_weight import Lanes, quantised_weight
from mpcompile.passes.quantize.mixed_precision import Limit, within_limit
from mpcompile.passes.quantize.observers import OBSERVERS
from mpcompile.passes.quantize.placement import PREFIX, Outputs, insert, sites
from mpcompile.passes.quantize.policy import quantizable
from mpcompile.passes.reconstruct.cross_validation import DAMPINGS
from mpcompile.passes.reconstruct.layerwise import layerwise
from mpcompile.passes.reconstruct.tied_weight import write
from mpcompile.pipeline.pass_record import Effect

if TYPE_CHECKING:
    ObserverName = str
else:  # the values that a recipe accepts; type checkers cannot read a Literal from a table
    ObserverName = Literal[tuple(OBSERVERS)]


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
        refit: whether the weights are refitted before they are rounded. Default: those that no pass has refitted.
        lanes: for x86 without VNNI, whose int8 kernels add products in 16 bits: the weights that share a lane are
            rounded so that no lane saturates (passes/quantize/lane_rule.py). `pairs`: the lanes of ONNX Runtime.
            `blocks`: in layers of at most 8 kept weights of 16, those of a kernel that skips zeros. `none`: no limit.
        max_drop: limit on the drop of accuracy from the dense model, in percentage points; needs labels. Layers are
            given back to floating point until it holds, and the others quantised again, about log₂ of the number of
            layers times (passes/quantize/mixed_precision.py).
        damping: λ of the ridge term of the refit, as in `nm-mask`.
        include: shell patterns over qualified names; layers to quantise that stay in floating point by default.
        exclude: shell patterns over qualified names; layers that stay in floating point. Wins over `include`.
    """

    name: ClassVar[str] = "quantize"
    effect: ClassVar[Effect] = Effect.LOSSY
    requires: ClassVar[tuple[str, ...]] = ()

    activations: ActivationType = "u8"
    outputs: Outputs = "convolutions"
    observer: ObserverName | None = None
    refit: bool | None = None
    lanes: Lanes = "none"
    max_drop: float | None = None
    damping: float | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises UsageError if a value is out of range."""
        if self.observer is not None and self.observer not in OBSERVERS:
            raise UsageError(f"observer is {self.observer!r}; the observers are {', '.join(OBSERVERS)}")
        if self.activations == "fp8" and self.lanes != "none":
            raise UsageError(
                f"lanes is {self.lanes!r} and activations fp8, which has no integer lanes; leave lanes out"
            )
        if self.activations == "fp8" and self.observer not in (None, "min-max"):
            raise UsageError(
                f"observer is {self.observer!r}, and ranges of fp8 are those of min-max; leave observer out"
            )
        if self.max_drop is not None and not 0 <= self.max_drop < float("inf"):
            raise UsageError(f"max_drop is {self.max_drop}; give a limit of 0 or more")
        if self.damping is not None and not 0 < self.damping < float("inf"):
            raise UsageError(f"damping is {self.damping}; give a number above 0, as {DAMPINGS[0]}")

    def require_inputs(self, model: Model, data: Data) -> None:
        """Raises PassError if there are no calibration images, or no labels for `max_drop`."""
        if not len(data.calibration):
            raise PassError("the ranges of activations are measured on calibration images; give --data")
        if self.max_drop is not None and not measured_on(data).judged:
            raise PassError("max_drop needs labels, and the validation images have none; leave max_drop out")

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
        check = measured_on(data)
        target, told = _reference(model)
        expected = outputs_of(model.graph, check)
        observer, chosen = self._observer(model, layers, data.calibration, check, expected)
        before = model.with_plan({n: replace(model.plan_of(n), unquantized=reason) for n, reason in reasons.items()})

        def quantised(layers: Sequence[str]) -> Model:
            return self._quantised(before, target, data.calibration, layers, observer)

        result, note = quantised(layers), None
        if self.max_drop is not None:
            dense = expected if model.dense is None else outputs_of(model.dense, check)
            limit = Limit(self.max_drop, check, dense, model.head)
            result, note = within_limit(result, before, layers, limit, quantised)
        notes = (*told, chosen, *result.notes[len(model.notes) :], _split(result, expected, check))
        return replace(result, notes=(*model.notes, *notes, *([] if note is None else [note])))

    def _observer(
        self, model: Model, layers: Sequence[str], images: Split, check: Split, expected: Tensor
    ) -> tuple[Observer, str]:
        """The observer, and a note on the choice; `expected` are the outputs on `check` before quantisation."""
        if self.activations == "fp8":  # its steps grow with the value: clipping gains nothing
            return OBSERVERS["min-max"], "activations in FP8, ranges by min-max"
        if self.observer is not None:
            return OBSERVERS[self.observer], f"ranges of activations by {self.observer}"
        graph = copy.deepcopy(model.graph)
        names = insert(graph, sites(model, layers, self.outputs), self.activations)
        best, note = best_observer(graph, names, self.activations, images, check, expected)
        return OBSERVERS[best], note

    def _quantised(
        self, before: Model, target: fx.GraphModule, images: Split, layers: Sequence[str], observer: Observer
    ) -> Model:
        """A copy of the model with these layers quantised towards the outputs of the graph `target`, and its notes."""
        places = sites(before, layers, self.outputs)
        model, reference = replace(before, graph=copy.deepcopy(before.graph)), copy.deepcopy(target)
        insert(model.graph, places, self.activations)
        insert(reference, places, self.activations)
        plans, silent = self._sweep(model, reference, images, layers, observer)
        return replace(model.with_plan(plans), notes=(*model.notes, *_never_active(silent)))

    def _sweep(
        self, model: Model, reference: fx.GraphModule, images: Split, layers: Sequence[str], observer: Observer
    ) -> tuple[dict[str, LayerPlan], list[str]]:
        """Quantises the layers in place, in order of execution. Returns their plans, and quantizers that saw only 0."""
        modules, silent = quantizers(model.graph), list[str]()

        def calibrate(name: str, batches: Sequence[Tensor]) -> None:
            values = sample(name, batches)
            modules[name].set_range(*range_of(observer, values, self.activations))
            if not values.any():
                silent.append(name)

        plans: dict[str, LayerPlan] = {}
        refitted = {
            name: model.plan_of(name).relative_error is None if self.refit is None else self.refit for name in layers
        }
        residual = any(refitted.values())
        for step in layerwise(model, reference, images, layers, residual=residual, calibrate=calibrate):
            with on_layer(step.weight.names[0]):
                if step.weight.norm is not None:
                    _copy_statistics(model.graph, reference, step.weight.norm)
                result = quantised_weight(
                    model, step, self.activations, self.lanes, self.damping, refitted=refitted[step.weight.names[0]]
                )
                write(step.weight, step.layer, result)
                for name in step.weight.names:
                    plans[name] = replace(
                        model.plan_of(name),
                        scale=result["scale"],
                        rounding_error=float(result["rounding_error"]),
                        unquantized=None,
                    )
            del step  # frees its moments before those of the next layer are collected
        return plans, silent


def _copy_statistics(graph: fx.GraphModule, reference: fx.GraphModule, norm: nn.Module) -> None:
    """Gives a batch normalization the statistics that belong to the targets, the layer's outputs in the reference.

    Earlier passes moved them by as much as the outputs of their weights had moved.
    """
    name = next(name for name, module in graph.named_modules() if module is norm)
    norm.load_state_dict(reference.get_submodule(name).state_dict())


def _reference(model: Model) -> tuple[fx.GraphModule, list[str]]:
    """The graph whose outputs are the targets, and a note if it is not the dense graph.

    It is the graph before quantisation if the dense graph has other nodes, or if training came after it. Layers with a
    factor on the logits have it in the dense graph too, so that no refit or bias takes it back.
    """
    if model.dense is None:
        return model.graph, []
    if not model.trained and same_nodes(model.graph, model.dense):
        return _with_logit_factors(model, model.dense), []
    cause = "was trained" if model.trained else "got other operations"
    return model.graph, [
        f"weights are rounded towards the outputs before 8 bits, since the model {cause} after masking"
    ]


def _with_logit_factors(model: Model, dense: fx.GraphModule) -> fx.GraphModule:
    """The dense graph, in which layers that the pass confidence scaled have the weights and biases of the model."""
    scaled = [name for name, plan in model.plan.items() if plan.logit_factor is not None]
    graph = copy.deepcopy(dense) if scaled else dense
    for name in scaled:
        graph.get_submodule(name).load_state_dict(model.layer(name).state_dict())
    return graph


def _never_active(names: Sequence[str]) -> list[str]:
    """A note on the quantizers whose inputs are 0 on all calibration images; none if there are none."""
    if not names:
        return []
    values = [name.removeprefix(f"{PREFIX}.") for name in names]
    shown = ", ".join(values[:4]) + (", …" if len(values) > 4 else "")
    return [f"activations that are 0 on all calibration images, so that their scale is 1: {shown}"]


def _split(model: Model, before: Tensor, images: Split) -> str:
    """How far the outputs move by the earlier passes alone, by 8 bits alone, and by both.

    `before` are the outputs before quantisation.
    """
    after = outputs_of(model.graph, images)
    by_rounding = shift_and_spread(after, before)[0]
    if model.dense is None:
        return f"8 bits shift the outputs by {by_rounding:.3g}"
    dense = outputs_of(model.dense, images)
    earlier, both = (shift_and_spread(outputs, dense)[0] for outputs in (before, after))
    if not earlier:
        return f"8 bits shift the outputs by {by_rounding:.3g}"
    return (
        f"the outputs shift by {earlier:.3g} before 8 bits, by {by_rounding:.3g} from 8 bits alone, "
        f"by {both:.3g} in all"
    )
