"""Gives the outputs of an ONNX graph their names where values within the graph have these names too.

torch.onnx names values by their operators, `relu` or `mean`, and a model may return a dict with such a key.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import onnx


def are_unique(file: onnx.ModelProto, names: Sequence[str]) -> bool:
    """Whether each of these outputs is the only value of its name."""
    values = Counter(name for node in _nodes(file.graph) for name in node.output)
    return all(values[name] <= 1 for name in names)


def provisional(names: Sequence[str]) -> list[str]:
    """Names for the outputs that no value within a graph has, in the same order."""
    return [f"mpcompile.output.{index}" for index in range(len(names))]


def rename_outputs(file: onnx.ModelProto, names: Sequence[str]) -> None:
    """Replaces the provisional names by `names`, and renames values within the graph that have these."""
    new = {name: f"{name}.value" for name in names} | dict(zip(provisional(names), names, strict=True))
    _rename(file.graph, new)


def _rename(graph: onnx.GraphProto, new: Mapping[str, str]) -> None:
    for value in (*graph.value_info, *graph.output):
        value.name = new.get(value.name, value.name)
    for node in _nodes(graph):
        node.input[:] = [new.get(name, name) for name in node.input]
        node.output[:] = [new.get(name, name) for name in node.output]
    for inner in _subgraphs(graph):
        for value in (*inner.value_info, *inner.output):
            value.name = new.get(value.name, value.name)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of its subgraphs."""
    yield from graph.node
    for inner in _subgraphs(graph):
        yield from inner.node


def _subgraphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graphs of branches and loops, at any depth."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield attribute.g
                yield from _subgraphs(attribute.g)
