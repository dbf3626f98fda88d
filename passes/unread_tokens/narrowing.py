"""Finds which positions of each node are read, and rewrites a graph so that the others are not computed.

The reads are found backwards: a selection such as `x[:, 0]` starts a Read, the rules of the operators
(passes/unread_tokens/operator_rules.py) carry it to their inputs, and the reads of all users of a node are united. A
node whose operator has no rule is computed whole, and its users get slices of it.
"""

import operator
from collections.abc import Mapping

from torch import fx, nn

from mpcompile.analysis.attention import shape_of
from mpcompile.analysis.operator_sets import DATA_MOVEMENT_NAMES, ELEMENTWISE_NAMES, SHAPE_QUERY_NAMES
from mpcompile.passes.unread_tokens.axis_read import Read, if_small, union
from mpcompile.passes.unread_tokens.operator_rules import Needs, changes_inputs, multiplies, name_of, needs, resize
from mpcompile.passes.unread_tokens.selection import EVERYTHING, selection_of, sizes_asked

PURE_NAMES = frozenset(["getattr"]).union(ELEMENTWISE_NAMES, DATA_MOVEMENT_NAMES, SHAPE_QUERY_NAMES)
Modules = Mapping[str, nn.Module]
Reads = Mapping[fx.Node, Read | None]


def reads_of(graph: fx.Graph, modules: Modules) -> Reads:
    """What later nodes read of each node; None: all of it. The graph must have been run under ShapeProp."""
    reads: dict[fx.Node, Read | None] = {}
    unused = unused_nodes(graph)
    for node in reversed(graph.nodes):
        if node in unused:
            continue
        for source, read in _needs(node, reads.get(node), modules).items():
            total = union(reads[source], read) if source in reads else read
            sizes = shape_of(source)
            reads[source] = if_small(total, sizes[total.axis]) if total and sizes else total
    return reads


def unused_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The calls whose result the output does not depend on. Calls that might have another effect are left out."""
    unused: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if name_of(node) in PURE_NAMES and not changes_inputs(node) and unused.issuperset(node.users):
            unused.add(node)
    return unused


def _needs(node: fx.Node, read: Read | None, modules: Modules) -> Needs:
    """What a node reads of its inputs, if `read` is read of it."""
    selection = selection_of(node)
    if selection is not None:
        return {selection.source: selection.source_read(read)}
    if sizes_asked(node) is not None:  # sizes are known without the values
        return {}
    found = None if read is None else _needs_by_rule(node, read, modules)
    return dict.fromkeys(node.all_input_nodes) if found is None else found


def _needs_by_rule(node: fx.Node, read: Read, modules: Modules) -> Needs | None:
    """`needs`, which also passes the Read of one result of chunk, split or unbind to that node."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node) and not shape_of(node.args[0]):
        return {node.args[0]: read}
    return needs(node, read, modules)


def narrowed_products(graph: fx.Graph, reads: Reads, modules: Modules) -> list[fx.Node]:
    """The Linear layers and products that `narrow` would compute in part."""
    return [node for node in graph.nodes if multiplies(node, modules) and _is_narrowed(node, reads, modules)]


def _is_narrowed(node: fx.Node, reads: Reads, modules: Modules) -> bool:
    read = reads.get(node)
    return read is not None and needs(node, read, modules) is not None


def narrow(graph: fx.Graph, reads: Reads, modules: Modules) -> None:
    """Rewrites the graph in place: a node whose operator has a rule computes only what is read of it.

    `reads` is the result of `reads_of` for this graph. Nodes that nothing depends on are removed: on fewer tokens they
    might fail.
    """
    unused = unused_nodes(graph)
    for node in reversed(graph.nodes):
        if node in unused:
            graph.erase_node(node)
    provided: dict[fx.Node, Read] = {}  # the positions that a node has; a node that is missing has all
    slices: dict[tuple[fx.Node, Read], fx.Node] = {}
    for node in list(graph.nodes):
        read = reads.get(node)
        selection, sizes = selection_of(node), sizes_asked(node)
        if selection is not None:
            if read is not None or selection.source in provided:
                node.op, node.target = "call_function", operator.getitem
                node.args = (selection.source, selection.relative(read, provided.get(selection.source)))
            if read is not None and read.axis in selection.out_axis:
                provided[node] = read
            continue
        if sizes is not None:
            _keep_size(node, sizes, provided)
            continue
        if node.target is operator.getitem and node.args[0] in provided:  # one result of chunk, split or unbind
            provided[node] = provided[node.args[0]]
            continue
        found = None if read is None else _needs_by_rule(node, read, modules)
        if found is None or read is None or node.target is operator.getitem:
            continue
        for source, part in found.items():
            if part is not None and provided.get(source) != part:
                if (source, part) not in slices:
                    slices[source, part] = _slice(node, source, part, provided.get(source))
                node.replace_input_with(source, slices[source, part])
        resize(node, read)
        provided[node] = read


def _slice(before: fx.Node, source: fx.Node, part: Read, provided: Read | None) -> fx.Node:
    """Inserts a node that takes `part` of a source that has the positions `provided`."""
    index = (*(EVERYTHING,) * part.axis, part.within(provided))
    with before.graph.inserting_before(before):
        new = before.graph.call_function(operator.getitem, (source, index))
    new.meta["nn_module_stack"] = before.meta.get("nn_module_stack", {})
    return new


def _keep_size(node: fx.Node, sizes: list[tuple[fx.Node, int]], provided: Mapping[fx.Node, Read]) -> None:
    """Replaces the size of a narrowed axis by its former value, on which other nodes may depend."""
    source = node.args[0]
    read = provided.get(source)  # type: ignore[arg-type]
    for user, axis in sizes:
        if read is not None and axis == read.axis:
            user.replace_all_uses_with(shape_of(source)[axis])  # type: ignore[arg-type]
