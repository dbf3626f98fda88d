"""Gives the layers back to floating point whose quantisation costs most, until the accuracy limit holds.

The cost of a layer is measured, on the validation images: how much less the logits shift from those of the float model
if this layer alone computes in floating point (its weight unrounded, its input not quantised). Layers are given back in
the order of their costs, one by one, until the drop is within the limit. The other layers are not rounded again,
although they were fitted to the outputs of the layers that are given back.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor, fx

from mpcompile.data.images import Split
from mpcompile.ir.head import Head
from mpcompile.ir.model import LayerPlan, Model
from mpcompile.passes.dense_comparison import accuracy_drop, outputs_of
from mpcompile.passes.quantize.placement import Outputs, keep_only, quantizer_nodes, quantizers_before, sites
from mpcompile.passes.reconstruct.tied_weight import TiedWeight, tied_weights
from mpcompile.system.progress import tracked

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limit:
    """The accuracy limit: the drop from the dense outputs, in points, on labelled images."""

    points: float
    images: Split
    dense: Tensor
    head: Head | None

    def drop(self, graph: fx.GraphModule) -> float:
        """The drop of a graph's accuracy in points."""
        return accuracy_drop(outputs_of(graph, self.images), self.dense, self.images, self.head)


def within_limit(
    model: Model, before: fx.GraphModule, layers: Sequence[str], outputs: Outputs, limit: Limit
) -> tuple[Model, str | None]:
    """The model with layers given back to floating point until it is within the limit, and a note; None if it was.

    `before` is the graph without quantisation. If its own drop exceeds the limit, the masks are the cause, and layers
    are given back only until the drop is no larger than that. Quantizers that only these layers needed are removed.
    """
    found, alone = limit.drop(model.graph), limit.drop(before)
    allowed = max(limit.points, alone)
    if found <= allowed:
        return model, None
    costs = layer_costs(model, before, layers, limit.images)
    weights = sorted(tied_weights(model, layers), key=lambda weight: -costs[weight.names[0]])
    left, plans, after = set(layers), dict[str, LayerPlan](), found
    for weight in tracked(weights, lambda weight: weight.names[0]):
        cost = costs[weight.names[0]]
        cause = f"its 8 bits moved the logits by {cost:.3g}" if cost > 0 else "layers that cost more did not suffice"
        reason = f"given back to floating point: {cause}"
        left -= set(weight.names)
        _copy_back(model.graph, before, weight)
        keep_only(model.graph, sites(replace(model, graph=before), left, outputs))
        plans |= {
            name: replace(model.plan_of(name), scale=None, rounding_error=None, unquantized=reason)
            for name in weight.names
        }
        log.info("%s is given back to floating point", weight.names[0])
        after = limit.drop(model.graph)
        if after <= allowed:
            break
    note = (
        f"8 bits lost {found:.2f} points of accuracy, {limit.points:g} are allowed; {len(plans)} layers given back to "
        f"floating point, which leaves {after:.2f}"
    )
    if alone > limit.points:
        note += f"; without quantisation the model loses {alone:.2f}"
    return model.with_plan(plans), note


def layer_costs(model: Model, before: fx.GraphModule, layers: Sequence[str], images: Split) -> dict[str, float]:
    """For each layer, how much the mean logit shift falls if this layer alone is given back, by qualified name.

    An input that other nodes read as well stays quantised, so only the weight counts for such a layer.
    """
    expected = outputs_of(before, images)

    def shift() -> float:
        return float((outputs_of(model.graph, images) - expected).abs().flatten(1).amax(1).mean())

    whole, costs = shift(), dict[str, float]()
    for weight in tracked(tied_weights(model, layers), lambda weight: weight.names[0]):
        with _in_float(model.graph, before, weight):
            costs |= dict.fromkeys(weight.names, whole - shift())
    return costs


@contextmanager
def _in_float(graph: fx.GraphModule, before: fx.GraphModule, weight: TiedWeight) -> Iterator[None]:
    """Lets a weight's layers compute in floating point while the context is open."""
    kept = {name: value.clone() for name, value in _tensors(graph, weight).items()}
    _copy_back(graph, before, weight)
    nodes = quantizer_nodes(graph)
    own = [name for name in quantizers_before(graph, weight.names) if len(nodes[name].users) == 1]
    modules = [graph.get_submodule(name) for name in own]
    for module in modules:
        module.calibrated = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for name, value in _tensors(graph, weight).items():
            value.copy_(kept[name])
        for module in modules:
            module.calibrated = True  # type: ignore[assignment]


def _copy_back(graph: fx.GraphModule, before: fx.GraphModule, weight: TiedWeight) -> None:
    """Copies a weight, its biases and the norm that absorbed its mean shift from the unquantised graph, in place."""
    source = _tensors(before, weight, graph)
    for name, value in _tensors(graph, weight).items():
        value.copy_(source[name])


def _tensors(graph: fx.GraphModule, weight: TiedWeight, named_in: fx.GraphModule | None = None) -> Mapping[str, Tensor]:
    """The tensors that quantising a weight writes, by name; the norm's name is looked up in the graph `named_in`."""
    names = list(weight.names)
    if weight.norm is not None:
        names += [name for name, module in (named_in or graph).named_modules() if module is weight.norm]
    return {
        f"{name}.{key}": value
        for name in names
        for key, value in graph.get_submodule(name).state_dict(keep_vars=True).items()
        if isinstance(value, Tensor) and not key.endswith("num_batches_tracked")
    }
