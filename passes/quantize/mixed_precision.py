"""Gives the layers back to floating point whose quantisation costs most, until the accuracy limit holds.

The cost of a layer is measured, on the validation images: how much less the logits shift from those of the float model
if this layer alone computes in floating point (its weight unrounded, its input not quantised). The costliest layers are
given back, as many as needed. For each number that is tried, the others are quantised again, since they are fitted to
the outputs of the layers before them. Bisection tries about log₂ of the number of layers.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor, fx

from mpcompile.data.images import Split
from mpcompile.ir.head import Head
from mpcompile.ir.model import Model
from mpcompile.passes.dense_comparison import accuracy_drop, mean_shift, outputs_of
from mpcompile.passes.quantize.placement import quantizer_nodes, quantizers_before
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
    model: Model,
    before: Model,
    layers: Sequence[str],
    limit: Limit,
    quantised: Callable[[Sequence[str]], Model],
) -> tuple[Model, str | None]:
    """The model with layers given back to floating point until it is within the limit, and a note; None if it was.

    If the drop of `before` alone exceeds the limit, the masks are the cause, and layers are given back only until the
    drop is no larger than that.

    Args:
        model: the model with all `layers` quantised.
        before: the model without quantisation.
        layers: qualified names.
        limit: the accuracy limit.
        quantised: returns `before` with these layers quantised.
    """
    found, alone = limit.drop(model.graph), limit.drop(before.graph)
    allowed = max(limit.points, alone)
    if found <= allowed:
        return model, None
    costs = layer_costs(model, before.graph, layers, limit.images)
    weights = sorted(tied_weights(model, layers), key=lambda weight: -costs[weight.names[0]])
    fewest, most, best, after = 1, len(weights), before, alone
    while fewest < most:
        count = (fewest + most) // 2
        left = {name for weight in weights[count:] for name in weight.names}
        log.info("quantising %d of %d layers, and the others stay in floating point", len(left), len(layers))
        trial = quantised([name for name in layers if name in left])
        drop = limit.drop(trial.graph)
        if drop <= allowed:
            most, best, after = count, trial, drop
        else:
            fewest = count + 1
    returned = [name for weight in weights[:most] for name in weight.names]
    lost = "points of accuracy" if limit.images.metric is None else f"of {limit.images.metric.name}"
    note = (
        f"8 bits lost {found:.2f} {lost}, {limit.points:g} are allowed; {len(returned)} layers given back "
        f"to floating point, which leaves {after:.2f}"
    )
    if alone > limit.points:
        note += f"; without quantisation the model loses {alone:.2f}"
    reasons = {name: _reason(costs[name]) for name in returned}
    return best.with_plan({n: replace(before.plan_of(n), unquantized=reason) for n, reason in reasons.items()}), note


def _reason(cost: float) -> str:
    """Why a layer of this cost was given back."""
    cause = f"its 8 bits moved the outputs by {cost:.3g}" if cost > 0 else "layers that cost more did not suffice"
    return f"given back to floating point: {cause}"


def layer_costs(model: Model, before: fx.GraphModule, layers: Sequence[str], images: Split) -> dict[str, float]:
    """For each layer, how much the mean logit shift falls if this layer alone is given back, by qualified name.

    An input that other nodes read as well stays quantised, so only the weight counts for such a layer.
    """
    expected = outputs_of(before, images)

    def shift() -> float:
        return mean_shift(outputs_of(model.graph, images), expected)

    whole, costs = shift(), dict[str, float]()
    for weight in tracked(tied_weights(model, layers), lambda weight: weight.names[0], "layers"):
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
