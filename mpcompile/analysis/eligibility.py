"""Which layers of a captured model can take an N:M pattern, and the reason for each that cannot.

Decided from module types and graph edges, never from the spelling of a name:

1. the weight is used exactly as it is stored, by a Linear or a Conv2d;
2. the layer is neither stem (no layer between the image and it) nor output layer (no layer after it), and the
   image reaches it at all;
3. it is not depthwise, and M divides its input channels (per group, for a grouped convolution).

The first and third are facts. The second is a default, which `include` overrides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from mpcompile.analysis.operator_sets import WEIGHT_FUNCTIONS
from mpcompile.errors import UsageError
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM

# These only pad or cast; any other subclass may rewrite its weight on the way (weight standardisation turns a kept
# zero into a number). By full name, so that timm need not be imported.
PLAIN_CLASSES = frozenset(
    {
        "torch.nn.modules.linear.Linear",
        "torch.nn.modules.linear.NonDynamicallyQuantizableLinear",
        "torch.nn.modules.conv.Conv2d",
        "timm.layers.linear.Linear",
        "timm.layers.conv2d_same.Conv2dSame",
    }
)
EXCLUDED = "excluded by"  # how the reason of a layer begins that was named to be left out


@dataclass(frozen=True, slots=True)
class GraphPosition:
    """Where a layer stands in the flow from the image to the output."""

    sees_image: bool
    layers_before: bool
    layers_after: bool
    weight_as_stored: bool  # by a linear or a convolution and by nothing else


def places(model: Model) -> dict[str, GraphPosition]:
    """Where each Linear and Conv2d of the graph stands, from one walk forwards and one backwards."""
    nodes: Sequence[fx.Node] = list(model.graph.graph.nodes)
    sites, altered = weight_sites(model.graph)
    applies = {node for found in sites.values() for node in found}

    sees_image: set[fx.Node] = set()
    layers_before: set[fx.Node] = set()
    for node in nodes:
        inputs = node.all_input_nodes
        if node.op == "placeholder" or any(i in sees_image for i in inputs):
            sees_image.add(node)
        if any(i in layers_before or (i in applies and i in sees_image) for i in inputs):
            layers_before.add(node)
    layers_after: set[fx.Node] = set()
    for node in reversed(nodes):
        if any(user in layers_after or user in applies for user in node.users):
            layers_after.add(node)

    return {
        name: GraphPosition(
            sees_image=any(site in sees_image for site in found),
            layers_before=any(site in layers_before for site in found),
            layers_after=any(site in layers_after for site in found),
            weight_as_stored=name not in altered,
        )
        for name, found in sites.items()
    }


def weight_sites(graph: fx.GraphModule) -> tuple[dict[str, list[fx.Node]], set[str]]:
    """The nodes that apply each layer's weight, and the layers whose weight is altered before it is applied."""
    modules = dict(graph.named_modules())
    sites: dict[str, list[fx.Node]] = {}
    altered: set[str] = set()
    for node in graph.graph.nodes:
        target = str(node.target)
        if node.op == "call_module":
            for inner, module in modules[target].named_modules(prefix=target):
                if isinstance(module, nn.Linear | nn.Conv2d):
                    sites.setdefault(inner, []).append(node)
        elif node.op == "get_attr" and isinstance(modules.get(target.rpartition(".")[0]), nn.Linear | nn.Conv2d):
            owner, _, field = target.rpartition(".")
            sites.setdefault(owner, []).extend(node.users)
            if field == "weight" and not all(_multiplies(user, node) for user in node.users):
                altered.add(owner)
    return sites, altered


def _multiplies(user: fx.Node, weight: fx.Node) -> bool:
    """Whether `user` is a plain linear or convolution with `weight` as its weight."""
    return user.target in WEIGHT_FUNCTIONS and weight in (*user.args[1:2], user.kwargs.get("weight"))


def fact_against(layer: nn.Linear | nn.Conv2d, place: GraphPosition | None, pattern: NM) -> str | None:
    """Why this layer cannot carry the pattern at all, or None where it can."""
    if reason := fact_against_any(layer, place):
        return reason
    out, inputs = layer.weight.shape[:2]
    if is_depthwise(layer):
        return "depthwise: one input channel per filter leaves nothing to choose from"
    if inputs % pattern.of:
        per = " per group" if isinstance(layer, nn.Conv2d) and layer.groups > 1 else ""
        return f"{inputs} input channels{per} are not a multiple of {pattern.of}"
    if out % pattern.rows:
        return f"{out} output channels are not a multiple of the {pattern.rows} that share a pattern"
    return None


def fact_against_any(layer: nn.Linear | nn.Conv2d, place: GraphPosition | None) -> str | None:
    """Why what is written into this layer's weight might not be what the graph multiplies by, or None."""
    kind = type(layer)
    if f"{kind.__module__}.{kind.__qualname__}" not in PLAIN_CLASSES:
        return f"{kind.__name__} may rewrite its weight before use, so zeros in it might not stay zeros"
    if layer._forward_pre_hooks or not isinstance(layer._parameters.get("weight"), nn.Parameter):
        return "its weight is computed on the way (a hook or parametrisation), so zeros in it might not stay zeros"
    if place is None:
        return "the graph does not use it"
    if not place.weight_as_stored:
        return "the graph uses its weight in another way than as a plain product, so zeros in it might not stay zeros"
    return None


def is_depthwise(layer: nn.Linear | nn.Conv2d) -> bool:
    """Whether each filter of a grouped convolution sees one input channel."""
    return isinstance(layer, nn.Conv2d) and layer.groups > 1 and layer.weight.shape[1] == 1


def default_against(place: GraphPosition) -> str | None:
    """Why this layer is left dense unless it is included by name, or None where it is not."""
    if not place.sees_image:
        return "the image does not reach it: it computes a constant"
    if not place.layers_before:
        return "stem: it reads the image itself"
    if not place.layers_after:
        return "output layer: no layer after it could make up for a loss"
    return None


def other_products(model: Model) -> dict[str, str]:
    """Modules that multiply by weights and are neither Linear nor Conv2d, with the reason why they stay dense."""
    found = {}
    for name, module in model.graph.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            found[name] = (
                "nn.MultiheadAttention packs query, key and value into one parameter that belongs to no Linear"
            )
        elif isinstance(module, _ConvNd | nn.Bilinear | nn.RNNBase) and not isinstance(module, nn.Conv2d):
            found[name] = f"{type(module).__name__}: only Linear and Conv2d can be masked"
    return found


def eligible(
    model: Model, pattern: NM, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> dict[str, str | None]:
    """For each layer that multiplies by weights: None where it takes its pattern, or why it stays dense.

    A layer's pattern is the one in its plan, which counts as including it, or else `pattern`. Layers that share a
    weight share a verdict. `include` and `exclude` are shell patterns over qualified names. Excluding wins; including
    overrides the defaults and not the facts. A pattern that matches no layer is a `UsageError`.
    """
    names = [name for name, _ in model.layers()]
    for glob in (*include, *exclude):
        if not any(fnmatchcase(name, glob) for name in names):
            shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
            raise UsageError(f"no layer is called {glob!r}; the layers are {shown}")
    where = places(model)
    verdicts: dict[str, str | None] = dict(other_products(model))
    for name, layer in model.layers():
        excluded = next((glob for glob in exclude if fnmatchcase(name, glob)), None)
        planned = model.plan_of(name).pattern is not None
        included = planned or any(fnmatchcase(name, glob) for glob in include)
        if excluded is not None:
            verdicts[name] = f"{EXCLUDED} {excluded!r}"
        else:
            place = where.get(name)
            # Where a weight is altered first, its users say nothing of where the layer stands.
            default = default_against(place) if place and place.weight_as_stored and not included else None
            verdicts[name] = default or fact_against(layer, place, model.plan_of(name).pattern or pattern)
    return _agreed_among_tied(model, verdicts)


def tied(model: Model, names: Sequence[str]) -> list[tuple[str, ...]]:
    """These layers in sets that share one weight, in the order of their first."""
    sharing: dict[int, list[str]] = {}
    for name in names:
        layer = model.layer(name)
        # Not its attribute: a parametrised weight is another tensor each time.
        sharing.setdefault(id(layer._parameters.get("weight", layer)), []).append(name)
    return [tuple(group) for group in sharing.values()]


def _agreed_among_tied(model: Model, verdicts: dict[str, str | None]) -> dict[str, str | None]:
    """The verdicts, with a reason against any layer taken as one against all that share its weight."""
    for names in tied(model, [name for name, _ in model.layers()]):
        against = next((name for name in names if verdicts[name]), None)
        for name in names:
            if against and not verdicts[name]:
                verdicts[name] = f"shares its weight with {against}, which stays dense ({verdicts[against]})"
    return verdicts
