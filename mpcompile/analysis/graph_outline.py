"""The captured graph as rows for a picture: its operations in order, and the modules that they belong to."""

import re
from collections.abc import Iterator

from torch import fx, nn

from mpcompile.ir.graph_node import GraphNode

SIZES = ("size", "dim", "numel")
LARGEST_GROUP = 40  # operations; a larger group is divided, if its module holds numbered modules
OVERLOAD = re.compile(r"\.(default|Tensor|Scalar|int|dim\w*)$")


def outline(graph: fx.GraphModule) -> tuple[GraphNode, ...]:
    """The operations of a graph in order.

    Left out are reads of sizes and of items, what is constant, and modules that do nothing in evaluation.
    """
    behind: dict[fx.Node, tuple[int, ...]] = {}  # operations whose results a node that is left out passes on
    kept: list[tuple[fx.Node, str, tuple[int, ...]]] = []
    for node in graph.graph.nodes:
        inputs = tuple(dict.fromkeys(at for given in node.all_input_nodes for at in behind.get(given, ())))
        kind = _kind(graph, node)
        if _reads_size(node, kind) or (not inputs and kind != "input"):
            continue
        if kind == "getitem" or _does_nothing(graph, node):
            behind[node] = inputs
            continue
        behind[node] = (len(kept),)
        kept.append((node, kind, inputs))
    groups = _groups([_path(node) for node, _, _ in kept])
    return tuple(
        GraphNode(
            name=str(node.target) if node.op == "call_module" else node.name,
            kind=kind,
            group=group,
            inputs=inputs,
            module=node.op == "call_module",
            layer=str(node.target) if _has_weights(graph, node) else None,
        )
        for (node, kind, inputs), group in zip(kept, groups, strict=True)
    )


def _kind(graph: fx.GraphModule, node: fx.Node) -> str:
    """The class of a module, or the name of a function or method."""
    if node.op in ("placeholder", "output"):
        return "input" if node.op == "placeholder" else "output"
    if node.op == "call_module":
        return type(graph.get_submodule(str(node.target))).__name__
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return OVERLOAD.sub("", name).strip("_")


def _reads_size(node: fx.Node, kind: str) -> bool:
    return kind in SIZES or (kind == "getattr" and node.args[1:] in (("shape",), ("ndim",)))


def _does_nothing(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether an operation is a module that is the identity in evaluation."""
    return node.op == "call_module" and (
        isinstance(graph.get_submodule(str(node.target)), nn.Identity | nn.modules.dropout._DropoutNd)
        or _kind(graph, node) == "DropPath"
    )


def _has_weights(graph: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(
        graph.get_submodule(str(node.target)), nn.Linear | nn.Conv2d | nn.MultiheadAttention
    )


def _path(node: fx.Node) -> tuple[str, ...]:
    """The names of the modules around an operation, from the outside; of a module its own name is the last."""
    if node.op == "placeholder":
        return ("input",)
    if node.op == "call_module":
        return tuple(str(node.target).split("."))
    stack = [name for name in node.meta.get("nn_module_stack", {}) if name]
    return tuple(stack[-1].split(".")) if stack else ()


def _groups(paths: list[tuple[str, ...]]) -> list[str]:
    """For each operation the module that it is shown in.

    That is the path up to the first number, such as `blocks.3` or `layer1.0`, or its first name. Where this holds more
    than LARGEST_GROUP operations, the path goes on to the next number. An operation outside all modules is shown with
    the operation before it.
    """
    found: list[str] = []
    for path in paths:
        found.append(next(_folded(path)) if path else (found[-1] if found else ""))
    while True:
        large = {group for group in found if found.count(group) > LARGEST_GROUP}
        divided = [
            next((name for name in _folded(path) if len(name) > len(group)), group)
            if group in large and path
            else group
            for path, group in zip(paths, found, strict=True)
        ]
        if divided == found:
            return found
        found = divided


def _folded(path: tuple[str, ...]) -> Iterator[str]:
    """The path up to its first number, to its second one, and so on; its first name if there is none."""
    ends = [n + 1 for n, name in enumerate(path) if name.isdigit()] or [1]
    yield from (".".join(path[:end]) for end in ends)
