"""Names of modules that fx.GraphModule uses itself, such as `meta` and `graph`, and the names they get in a graph."""

from torch import fx, nn

RESERVED = frozenset(dir(fx.GraphModule)) - frozenset(dir(nn.Module)) | {"meta"}


def name_in_graph(name: str) -> str:
    """The name in a graph of a tensor or module of the original: `meta.weight` -> `meta_.weight`."""
    first, dot, rest = name.partition(".")
    return f"{first}_{dot}{rest}" if first in RESERVED else name


def free_names(root: nn.Module, graph: fx.Graph) -> None:
    """Renames children of the root that fx.GraphModule could not hold, in the root and in the graph."""
    taken = [name for name, _ in root.named_children() if name in RESERVED]
    for name in taken:
        root.add_module(name_in_graph(name), root._modules.pop(name))
    for node in graph.nodes if taken else ():
        if node.op in ("call_module", "get_attr"):
            node.target = name_in_graph(str(node.target))
