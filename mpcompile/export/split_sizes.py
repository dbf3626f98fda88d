"""Gives calls of split and chunk along an axis that holds the batch the sizes of their pieces.

`torch.cat([x, y]).chunk(2)` gives two pieces for every batch size. torch.export counts the pieces of the example, and
takes the count for a condition on the batch size, which fixes it. `torch.split(x, sizes)` has no such condition.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

CALLS = ("split", "chunk")


class _PieceCounts(fx.Interpreter):
    """Notes the size of the axis and the number of pieces of each split or chunk of a run."""

    def __init__(self, module: fx.GraphModule, calls: Sequence[fx.Node]) -> None:
        super().__init__(module)
        self.found: dict[fx.Node, tuple[int, int]] = {}
        self._calls = frozenset(calls)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self._calls:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            whole, _, axis = _arguments(n, args, kwargs)
            self.found[n] = whole.shape[axis], len(result)
        return result


def with_piece_sizes(module: fx.GraphModule, inputs: tuple[Tensor, ...]) -> fx.GraphModule:
    """The module with such calls rewritten in a graph of its own, which shares all weights; itself if it has none.

    Args:
        module: the captured graph.
        inputs: examples of all inputs, with the batch first. A batch of the same size and one that is larger by one
            image are run, to see which axes grow with the batch.
    """
    calls = [n for n in module.graph.nodes if _is_split(n)]
    if not calls:
        return module
    first, second = (_counted(module, calls, batch) for batch in (inputs, tuple(_one_more(x) for x in inputs)))
    growing = {n: pieces for n, (size, pieces) in first.items() if second[n][0] != size and second[n][1] == pieces}
    if not growing:
        return module
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, copies))
    for node, pieces in growing.items():
        _rewrite(copies[node], pieces, even=all(run[node][0] % pieces == 0 for run in (first, second)))
    graph.lint()
    return fx.GraphModule(module, graph, type(module).__name__)


def _counted(
    module: fx.GraphModule, calls: Sequence[fx.Node], inputs: tuple[Tensor, ...]
) -> dict[fx.Node, tuple[int, int]]:
    counts = _PieceCounts(module, calls)
    with torch.no_grad():
        counts.run(*(x.clone() for x in inputs))  # forward may write into its inputs
    return counts.found


def _one_more(batch: Tensor) -> Tensor:
    return torch.cat([batch, batch[:1]])


def _is_split(node: fx.Node) -> bool:
    """Whether a node splits a tensor into pieces whose number follows from a size."""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    if node.op not in ("call_method", "call_function") or name not in CALLS:
        return False
    return not isinstance(_arguments(node, node.args, node.kwargs)[1], list | tuple)


def _arguments(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """The tensor, the size or number of pieces, and the axis."""
    names = ("split_size", "split_size_or_sections", "chunks")
    whole = args[0] if args else kwargs.get("tensor", kwargs.get("input"))
    amount = args[1] if len(args) > 1 else next((kwargs[name] for name in names if name in kwargs), None)
    return whole, amount, args[2] if len(args) > 2 else kwargs.get("dim", 0)


def _rewrite(node: fx.Node, pieces: int, even: bool) -> None:
    """Replaces a split or chunk by one with the size of each piece: all alike, and the rest in the last."""
    whole, amount, axis = _arguments(node, node.args, node.kwargs)
    graph = node.graph
    with graph.inserting_before(node):
        total = graph.call_method("size", (whole, axis))
        if "chunk" not in str(node.target):
            size = amount
        elif even:
            size = graph.call_function(operator.floordiv, (total, pieces))
        else:
            longer = graph.call_function(operator.add, (total, pieces - 1))
            size = graph.call_function(operator.floordiv, (longer, pieces))
        others = graph.call_function(operator.mul, (size, pieces - 1))
        last = graph.call_function(operator.sub, (total, others))
        split = graph.call_function(torch.split, (whole, [*([size] * (pieces - 1)), last], axis))
    node.replace_all_uses_with(split)
    graph.erase_node(node)
