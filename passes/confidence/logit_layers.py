"""Finds the layers that compute the logits, so that a factor on the logits can be folded into their weights and biases.

From the primary output back to these layers, only operations with f(a x) = a f(x) for a > 0 are allowed: reshaping,
slicing, dropout, means and pooling, products with numbers and with values that are the same for every image (a learned
scale), and sums or concatenations of several heads. A softmax or sigmoid at the end is allowed if the head's outputs
are probabilities.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx, nn

from mpcompile.analysis.eligibility import graph_positions, reason_uneditable, weight_nodes
from mpcompile.analysis.operator_sets import (
    ADDITIONS,
    CONCATENATION_NAMES,
    DATA_MOVEMENT_MODULES,
    DATA_MOVEMENT_NAMES,
    EVAL_IDENTITY_MODULES,
    RESHAPE_AS_NAMES,
    SHAPE_QUERY_NAMES,
    SPATIAL_MODULES,
    SPATIAL_NAMES,
)
from mpcompile.ir.head import Head
from mpcompile.ir.model import Model

CONVERSIONS = frozenset(["float", "to", "type", "type_as", "contiguous", "clone", "detach", "dropout"])
ONE_INPUT = DATA_MOVEMENT_NAMES | RESHAPE_AS_NAMES | CONVERSIONS | SPATIAL_NAMES | {"mean", "sum"}
FUNCTIONAL_LAYERS = frozenset(["linear", "matmul", "mm", "addmm", "bmm", "einsum", "conv1d", "conv2d", "conv3d"])
PRODUCTS = frozenset(["mul", "mul_", "div", "div_", "truediv"])
# Of these, a constant that is added to every logit does not come out as the same constant.
MOVES_CONSTANTS = frozenset(["sum", "sub", "avg_pool2d"]) | CONCATENATION_NAMES
LAST = {"softmax": ("softmax", "log_softmax"), "sigmoid": ("sigmoid",)}
LAST_MODULES = {nn.Softmax: "softmax", nn.LogSoftmax: "log_softmax", nn.Sigmoid: "sigmoid"}


class NotFoldable(Exception):
    """Why a factor on the logits cannot be folded into weights, as the end of a sentence."""


@dataclass(frozen=True, slots=True)
class LogitLayers:
    """The layers whose outputs make up the logits.

    Attributes:
        names: qualified names, in the order in which they were found.
        gain: of the first layer: adding c to its output adds gain × c to the logits; None if that does not hold.
    """

    names: tuple[str, ...]
    gain: float | None


@dataclass
class _Trace:
    """What is known while the graph is followed from its output to the layers."""

    model: Model
    head: Head
    layer_of: dict[fx.Node, str] = field(default_factory=dict)
    seen: dict[fx.Node, None] = field(default_factory=dict)  # in the order of the search
    gains: dict[str, float] = field(default_factory=dict)  # of each layer found
    keeps_constants: bool = True


def logit_layers(model: Model, head: Head) -> LogitLayers:
    """The layers that compute the logits of a model with this head. Raises NotFoldable."""
    nodes_of, _ = weight_nodes(model.graph)
    trace = _Trace(model, head, {node: name for name, nodes in nodes_of.items() for node in nodes})
    output = next(node for node in model.graph.graph.nodes if node.op == "output")
    returned = tuple(output.args[0]) if isinstance(output.args[0], tuple | list) else (output.args[0],)
    if not isinstance(returned[0], fx.Node) or not _depends_on_input(returned[0]):
        raise NotFoldable("the output is a constant")
    _follow(trace, returned[0], 1.0, last=True)
    for node in trace.seen:
        _require_alone(trace, node, output, returned[1:])
    _require_own_weights(trace, nodes_of)
    names = tuple(trace.gains)
    return LogitLayers(names, trace.gains[names[0]] if trace.keeps_constants else None)


def _follow(trace: _Trace, node: fx.Node, gain: float, last: bool) -> None:
    """Follows the graph from a node to the layers that compute it. `last`: only data movement comes after the node."""
    if node in trace.seen and node not in trace.layer_of:
        trace.keeps_constants = False  # two ways to it add its constant twice
    trace.seen[node] = None
    if node in trace.layer_of:
        return _take(trace, node, gain)
    name = _name(trace.model.graph, node)
    if last and name in _probability_names(trace.head):
        return _follow(trace, _first(node), gain, last=False)
    trace.keeps_constants &= name not in MOVES_CONSTANTS
    if name in CONCATENATION_NAMES or node.target in ADDITIONS or name == "sub":
        for part in _parts(node):
            _follow(trace, part, gain, last=False)
    elif name in PRODUCTS:
        value, factor = _scaled(node)
        trace.keeps_constants &= factor is not None  # a learned scale may differ between outputs
        _follow(trace, value, gain * (factor or 1.0), last=False)
    elif name in ONE_INPUT:
        _follow(trace, _first(node), gain, last and name not in SPATIAL_NAMES | {"mean", "sum"})
    else:
        raise NotFoldable(_not_a_layer(trace.model.graph, node))


def _take(trace: _Trace, node: fx.Node, gain: float) -> None:
    """Takes the layer that a node applies. Raises NotFoldable if its weights cannot be scaled."""
    name = trace.layer_of[node]
    if node.op == "call_module" and node.target != name:
        raise NotFoldable(f"{name} is applied inside a module that the graph calls as a whole")
    reason = reason_uneditable(trace.model.layer(name), graph_positions(trace.model).get(name))
    if reason:
        raise NotFoldable(f"{name} cannot be changed: {reason}")
    if trace.gains.get(name, gain) != gain:
        trace.keeps_constants = False
    trace.gains[name] = gain


def _require_alone(trace: _Trace, node: fx.Node, output: fx.Node, others: tuple[object, ...]) -> None:
    """Raises NotFoldable if a value between the layers and the logits is used elsewhere."""
    if node in others:
        raise NotFoldable(f"another output of the model depends on the same values ({node.name})")
    for user in node.users:
        asks_shape = _name(trace.model.graph, user) in SHAPE_QUERY_NAMES or (
            user.target is getattr and user.args[1] in SHAPE_QUERY_NAMES
        )
        if user not in trace.seen and user is not output and not asks_shape:
            raise NotFoldable(f"{user.name} uses the values of {node.name} too, beside the logits")


def _require_own_weights(trace: _Trace, nodes_of: dict[str, list[fx.Node]]) -> None:
    """Raises NotFoldable if a layer found is applied elsewhere, or shares its weight or bias with another one."""
    owners: dict[int, set[str]] = {}
    for name, parameter in trace.model.graph.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(name.rpartition(".")[0])
    for name in trace.gains:
        if any(node not in trace.seen for node in nodes_of[name]):
            raise NotFoldable(f"{name} is applied elsewhere too")
        for parameter in trace.model.layer(name).parameters(recurse=False):
            if shared := owners[id(parameter)] - {name}:
                raise NotFoldable(f"{name} shares its weight or bias with {min(shared)}")


def _name(graph: fx.GraphModule, node: fx.Node) -> str:
    """The name of a node's operation; modules have the name of the function that they are."""
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        if isinstance(module, nn.AvgPool2d):
            return "avg_pool2d"
        if isinstance(module, (*EVAL_IDENTITY_MODULES, *DATA_MOVEMENT_MODULES)):
            return "contiguous"
        if isinstance(module, SPATIAL_MODULES):
            return "interpolate"
        return LAST_MODULES.get(type(module), "")
    if node.op in ("call_function", "call_method"):
        return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return ""


def _not_a_layer(graph: fx.GraphModule, node: fx.Node) -> str:
    """Why the search for layers ends at a node, as the end of a sentence."""
    if node.op in ("placeholder", "get_attr"):
        return f"the logits come from {'an input' if node.op == 'placeholder' else 'a parameter'} ({node.name})"
    name = _name(graph, node)
    if name in FUNCTIONAL_LAYERS:
        return f"the logits come from a call of {name} ({node.name}) whose weights belong to no layer"
    if node.op == "call_module":
        name = type(graph.get_submodule(str(node.target))).__name__
    return f"the logits come from {name or node.op} ({node.name}), through which no factor passes"


def _probability_names(head: Head) -> tuple[str, ...]:
    """The operations at the end of a model that keep the effect of a factor on the logits."""
    if head.kind != "softmax":
        return LAST["sigmoid"] if head.probabilities else ()
    return (*LAST["softmax"], *LAST["sigmoid"]) if head.probabilities else ("log_softmax",)


def _first(node: fx.Node) -> fx.Node:
    """The value that an operation with one input reads."""
    given = (*node.args, *node.kwargs.values())
    value = next((one for one in given if isinstance(one, fx.Node)), None)
    if value is None:
        raise NotFoldable(f"the logits come from {node.name}, which reads no value")
    return value


def _parts(node: fx.Node) -> Iterator[fx.Node]:
    """The values that a sum, a difference or a concatenation reads. Raises NotFoldable for a constant among them."""
    given = node.args[0] if node.args and isinstance(node.args[0], tuple | list) else node.args[:2]
    for one in given:
        if not isinstance(one, fx.Node) or not _depends_on_input(one):
            raise NotFoldable(f"a constant is added to the logits ({node.name})")
        yield one


def _scaled(node: fx.Node) -> tuple[fx.Node, float | None]:
    """The value of a product or quotient that depends on the input, and its factor if that is a number.

    Raises NotFoldable unless the factor is the same for every input, or if it is 0.
    """
    divides = "div" in str(getattr(node.target, "__name__", node.target))
    one, other = node.args[:2]
    if not divides and not _depends_on_input(one):
        one, other = other, one
    if _depends_on_input(other):
        what = "divided by a value that depends" if divides else "a product of two values that depend"
        raise NotFoldable(f"the logits are {what} on the input ({node.name})")
    assert isinstance(one, fx.Node)
    if not isinstance(other, int | float):
        return one, None
    if other == 0:
        raise NotFoldable(f"the logits are a value times 0 ({node.name})")
    return one, 1 / other if divides else float(other)


def _depends_on_input(value: object) -> bool:
    """Whether a value of the graph is computed from an input, rather than from parameters and numbers alone."""
    waiting, seen = [value], set[object]()
    while waiting:
        node = waiting.pop()
        if isinstance(node, fx.Node) and node not in seen:
            if node.op == "placeholder":
                return True
            seen.add(node)
            waiting += node.all_input_nodes
    return False
