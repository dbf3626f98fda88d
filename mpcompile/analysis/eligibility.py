"""Which layers of a captured model can take an N:M pattern, and the reason for each that cannot.

A layer is eligible if

1. its weight is used exactly as it is stored, by a Linear or a Conv2d;
2. it is neither a stem (no layer between the image and it) nor an output layer (no layer after it), and its input
   depends on the image;
3. it is not depthwise, and M divides its input channels (per group, for a grouped convolution).

Conditions 1 and 3 always hold. Condition 2 is a default that `include` overrides. All are decided from module types and
graph edges, never from the name of a layer.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from mpcompile.analysis.operator_sets import SHAPE_QUERY_NAMES, WEIGHT_FUNCTIONS
from mpcompile.errors import UsageError
from mpcompile.frontend.leaf_modules import PLAIN_CLASSES, class_name
from mpcompile.frontend.multihead_attention import reasons_whole
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM, TWO_OF_FOUR
from mpcompile.ir.pattern_choice import Alternatives, pattern_for, reason_unfit

# Operators that multiply by a weight, as functions or methods.
WEIGHT_PRODUCT_NAMES = frozenset(
    """
    linear bilinear matmul __matmul__ mm bmm mv addmm addbmm baddbmm einsum tensordot inner
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
    """.split()  # noqa: SIM905
)
EXCLUDED = "excluded by"  # prefix of the reason of a layer that `exclude` matches


@dataclass(frozen=True, slots=True)
class GraphPosition:
    """The position of a layer in the graph.

    Attributes:
        sees_image: its input depends on the image.
        layers_before: a layer that sees the image is between the image and it. Layers of other kinds count too.
        layers_after: a layer of any kind is between it and the output.
            Layers of a larger model around this one count for both.
        weight_as_stored: only linear and convolution operators use its weight, and as it is stored.
    """

    sees_image: bool
    layers_before: bool
    layers_after: bool
    weight_as_stored: bool


def graph_positions(model: Model) -> dict[str, GraphPosition]:
    """The position of each Linear and Conv2d that the graph uses, by qualified name."""
    nodes: Sequence[fx.Node] = list(model.graph.graph.nodes)
    nodes_of, altered = weight_nodes(model.graph)
    applies = {node for applying in nodes_of.values() for node in applying} | _nodes_of_other_weights(model.graph)
    applies |= {node for node in nodes if node.target in WEIGHT_FUNCTIONS}  # of a weight that the graph computes, too

    sees_image: set[fx.Node] = set()
    layers_before: set[fx.Node] = set()
    for node in nodes:
        inputs = node.all_input_nodes
        if _depends_on(node, sees_image):
            sees_image.add(node)
        preceded = model.around[0] and node.op == "placeholder"
        if preceded or any(i in layers_before or (i in applies and i in sees_image) for i in inputs):
            layers_before.add(node)
    layers_after: set[fx.Node] = set()
    for node in reversed(nodes):
        followed = model.around[1] and any(user.op == "output" for user in node.users)
        if followed or any(user in layers_after or user in applies for user in node.users):
            layers_after.add(node)

    return {
        name: GraphPosition(
            sees_image=any(node in sees_image for node in applying),
            layers_before=any(node in layers_before for node in applying),
            layers_after=any(node in layers_after for node in applying),
            weight_as_stored=name not in altered,
        )
        for name, applying in nodes_of.items()
    }


def weight_nodes(graph: fx.GraphModule) -> tuple[dict[str, list[fx.Node]], set[str]]:
    """The nodes that apply each layer's weight, and the layers whose weight other operators read.

    A node applies a weight by calling the layer, by calling a module that contains it, or by reading the weight or bias
    that a get_attr node fetches. Layers are given by qualified name.
    """
    modules = dict(graph.named_modules())
    nodes_of: dict[str, list[fx.Node]] = {}
    altered: set[str] = set()
    for node in graph.graph.nodes:
        target = str(node.target)
        if node.op == "call_module":
            for inner, module in modules[target].named_modules(prefix=target):
                if isinstance(module, nn.Linear | nn.Conv2d):
                    nodes_of.setdefault(inner, []).append(node)
        elif node.op == "get_attr" and isinstance(modules.get(target.rpartition(".")[0]), nn.Linear | nn.Conv2d):
            owner, _, field = target.rpartition(".")
            nodes_of.setdefault(owner, []).extend(node.users)
            if field == "weight" and not all(_multiplies(user, node) for user in node.users):
                altered.add(owner)
    return nodes_of, altered


def _nodes_of_other_weights(graph: fx.GraphModule) -> set[fx.Node]:
    """The nodes that apply other weights than those of Linear and Conv2d: nn.GRU, a product with a parameter."""
    nodes: set[fx.Node] = set()
    from_image: set[fx.Node] = set()
    from_weights: set[fx.Node] = set()
    for node in graph.graph.nodes:
        inputs = node.all_input_nodes
        if _depends_on(node, from_image):
            from_image.add(node)
        elif _is_parameter(graph, node) or not from_weights.isdisjoint(inputs):
            from_weights.add(node)
        if node.op == "call_module":
            applies = any(map(_applies_weights, graph.get_submodule(str(node.target)).modules()))
        else:
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
            applies = name in WEIGHT_PRODUCT_NAMES and not from_weights.isdisjoint(inputs)
        if applies and node in from_image:
            nodes.add(node)
    return nodes


def _depends_on(node: fx.Node, images: Set[fx.Node]) -> bool:
    """Whether a node is an input, or computes with one of these nodes; a question about their shape does not count."""
    asks_shape = node.target in SHAPE_QUERY_NAMES or (node.target is getattr and node.args[1] in SHAPE_QUERY_NAMES)
    return node.op == "placeholder" or (not asks_shape and not images.isdisjoint(node.all_input_nodes))


def _is_parameter(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node fetches a parameter."""
    owner, _, field = str(node.target).rpartition(".")
    return node.op == "get_attr" and isinstance(getattr(graph.get_submodule(owner), field, None), nn.Parameter)


def _applies_weights(module: nn.Module) -> bool:
    """Whether a module multiplies by a weight of its own and is neither Linear nor Conv2d."""
    foreign = not type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Linear | nn.Conv2d)
    own = foreign and any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))
    return own or _has_other_weights(module)


def _has_other_weights(module: nn.Module) -> bool:
    """Whether a module of torch has a weight matrix and is neither Linear nor Conv2d."""
    other = isinstance(module, _ConvNd | nn.Bilinear | nn.RNNBase | nn.RNNCellBase | nn.MultiheadAttention)
    return other and not isinstance(module, nn.Conv2d)


def _multiplies(user: fx.Node, weight: fx.Node) -> bool:
    """Whether `user` is a linear or convolution function whose weight argument is `weight`."""
    return user.target in WEIGHT_FUNCTIONS and weight in (*user.args[1:2], user.kwargs.get("weight"))


def reason_incompatible(
    layer: nn.Linear | nn.Conv2d, position: GraphPosition | None, choice: NM | Alternatives
) -> str | None:
    """Why this layer can have no pattern of the choice, even if `include` matches it, or None."""
    if reason := reason_uneditable(layer, position):
        return reason
    out, inputs = layer.weight.shape[:2]
    if is_depthwise(layer):
        return "depthwise: one input channel per filter leaves nothing to choose from"
    return reason_unfit(choice, out, inputs, " per group" if isinstance(layer, nn.Conv2d) and layer.groups > 1 else "")


def reason_uneditable(layer: nn.Linear | nn.Conv2d, position: GraphPosition | None) -> str | None:
    """Why editing `layer.weight` might not change what the graph computes (subclass, hook, parametrization), or None.

    `position` is None for a layer that the graph does not use.
    """
    kind = type(layer)
    if class_name(layer) not in PLAIN_CLASSES:
        return f"{kind.__name__} may rewrite its weight before use, so zeros in it might not stay zeros"
    if layer._forward_pre_hooks or not isinstance(layer._parameters.get("weight"), nn.Parameter):
        return "its weight is computed before each use (a hook or parametrization), so zeros in it might not stay zeros"
    if position is None:
        return "the graph does not use it"
    if not position.weight_as_stored:
        return "an operator other than linear or convolution uses its weight, so zeros in it might not stay zeros"
    return None


def is_depthwise(layer: nn.Linear | nn.Conv2d) -> bool:
    """Whether the layer is a grouped convolution with one input channel per filter."""
    return isinstance(layer, nn.Conv2d) and layer.groups > 1 and layer.weight.shape[1] == 1


def reason_dense_by_default(position: GraphPosition) -> str | None:
    """Why this layer stays dense unless `include` matches it, or None."""
    if not position.sees_image:
        return "its input does not depend on the image: it computes a constant"
    if not position.layers_before:
        return "stem: it reads the image itself"
    if not position.layers_after:
        return "output layer: no layer after it could make up for a loss"
    return None


def unsupported_modules(model: Model) -> dict[str, str]:
    """The reason why each module with a weight matrix that is neither Linear nor Conv2d stays dense."""
    whole = reasons_whole(model.graph)
    reasons = {}
    for name, module in model.graph.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.MultiheadAttention):
            reasons[name] = (
                "nn.MultiheadAttention packs query, key and value into one parameter that belongs to no Linear, and "
                f"this one {whole[name]}"
            )
        elif isinstance(module, _ConvTransposeNd):
            reasons[name] = (
                f"{kind}: a transposed convolution sums over its input channels along axis 0 of its weight; no target "
                "has an N:M kernel for it"
            )
        elif isinstance(module, nn.Conv1d):
            reasons[name] = (
                f"{kind}: it is not run as a Conv2d, because it has a forward or hooks of its own, is kept inside a "
                "leaf, or another operator reads its weight"
            )
        elif _has_other_weights(module):
            reasons[name] = f"{kind}: only Linear, Conv1d and Conv2d can be masked"
    return reasons


def eligible_patterns(
    model: Model, pattern: NM | Alternatives | None, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> dict[str, NM | str]:
    """The pattern of each layer, or the reason why it stays dense, by qualified name.

    A layer's pattern is the one in its plan, or else `pattern`; of alternatives, the first whose M divides its width.
    If `pattern` is None, layers without a planned pattern get 2:4, or stay dense if a budget planned patterns for other
    layers. `include` and `exclude` are as in `eligible`, which raises the same UsageError.
    """
    budgeted = any(plan.pattern is not None and plan.mask is None for plan in model.plan.values())
    default = pattern or (None if budgeted else TWO_OF_FOUR)
    patterns: dict[str, NM | str] = {}
    for name, reason in eligible(model, default or TWO_OF_FOUR, include, exclude).items():
        plan = model.plan_of(name)
        own = plan.pattern or default
        if own is None:
            patterns[name] = plan.skipped or "no pattern was planned for it"
        else:
            patterns[name] = reason or pattern_for(own, model.layer(name).weight.shape[1])
    return patterns


def eligible(
    model: Model, pattern: NM | Alternatives, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> dict[str, str | None]:
    """For each module with a weight matrix, by qualified name: None if it is eligible, or why it stays dense.

    A layer's pattern is the one in its plan, or else `pattern`. A planned pattern counts as including the layer. Layers
    that share a weight are eligible together or not at all.

    `include` and `exclude` are shell patterns over qualified names. `include` overrides condition 2 above (stem, output
    layer), but not conditions 1 and 3 (such as a width that M does not divide). Layers that match `exclude` stay dense,
    even if they match `include`. Raises UsageError if a shell pattern matches no layer.
    """
    require_matches([name for name, _ in model.layers()], (*include, *exclude))
    positions = graph_positions(model)
    reasons: dict[str, str | None] = dict(unsupported_modules(model))
    for name, layer in model.layers():
        excluded = next((glob for glob in exclude if fnmatchcase(name, glob)), None)
        planned = model.plan_of(name).pattern is not None
        included = planned or any(fnmatchcase(name, glob) for glob in include)
        if excluded is not None:
            reasons[name] = f"{EXCLUDED} {excluded!r}"
        else:
            position = positions.get(name)
            # If other operators read the weight, the nodes that read it do not tell the position of the layer.
            if position and position.weight_as_stored and not included:
                default = reason_dense_by_default(position)
            else:
                default = None
            reasons[name] = default or reason_incompatible(layer, position, model.plan_of(name).pattern or pattern)
    return agreed_among_tied(model, reasons, "stays dense")


def require_matches(names: Sequence[str], globs: Sequence[str]) -> None:
    """Raises UsageError if one of these shell patterns matches no layer name."""
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
            raise UsageError(f"no layer name matches {glob!r}; the layers are {shown}")


def tied_layers(model: Model, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Groups of these layers that share one weight tensor, in the order of their first names."""
    groups: dict[int, list[str]] = {}
    for name in names:
        layer = model.layer(name)
        # `layer.weight` would not do: a parametrized weight is a new tensor at each access.
        groups.setdefault(id(layer._parameters.get("weight", layer)), []).append(name)
    return [tuple(group) for group in groups.values()]


def agreed_among_tied(model: Model, reasons: Mapping[str, str | None], what: str) -> dict[str, str | None]:
    """The reasons, where a layer with a reason gives one to all layers that share its weight.

    `what` says what happens to a layer with a reason, such as `stays dense`.
    """
    agreed = dict(reasons)
    for names in tied_layers(model, [name for name, _ in model.layers()]):
        first = next((name for name in names if reasons[name]), None)
        for name in names:
            if first and not agreed[name]:
                agreed[name] = f"shares its weight with {first}, which {what} ({reasons[first]})"
    return agreed
