"""The captured graph as a picture, folded by module: a row for each operation, with arcs from its inputs further up.

Layers and modules are coloured by their loss or by their time, in LEVELS steps relative to the largest one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mpcompile.ir.graph_node import GraphNode
from mpcompile.report.layer_values import LayerValues, losses, times
from mpcompile.report.schema import Report

LEVELS = 5  # of a colour; 0 stands for no value
ROW, DOTS, FARTHEST = 22, 60, 48  # pixels: of a row; of the dots from the left; of the farthest arc from the dots


@dataclass(frozen=True, slots=True)
class Operation:
    """A row: where it is in pixels, its text, its numbers, its colours. A click opens layer number `layer`."""

    y: int
    text: str
    values: str
    loss: int
    time: int
    layer: int | None


@dataclass(frozen=True, slots=True)
class ModuleGroup:
    """A module: the modules that it reads, its colours, its operations, and arcs as SVG paths."""

    name: str
    reads: tuple[str, ...]
    loss: int
    time: int
    operations: tuple[Operation, ...]
    arcs: tuple[str, ...]

    @property
    def height(self) -> int:
        """The height of its picture, in pixels."""
        return ROW * len(self.operations)


@dataclass(frozen=True, slots=True)
class GraphPicture:
    """The modules in the order of the graph, and in words what the colours by loss and by time stand for."""

    groups: tuple[ModuleGroup, ...]
    loss: str | None
    time: str | None


def graph_picture(report: Report) -> GraphPicture | None:
    """The picture of a report's graph; None if the report has no graph, as those of earlier versions."""
    if not report.graph:
        return None
    loss, time = losses(report), times(report)
    members: dict[str, list[int]] = {}
    for n, node in enumerate(report.graph):
        members.setdefault(node.group, []).append(n)
    layers = {name: [layer for n in rows if (layer := report.graph[n].layer)] for name, rows in members.items()}
    loss_levels, time_levels = (_levels(values, layers) for values in (loss, time))
    numbers = {row.name: n for n, row in enumerate(report.layers)}
    loss_of, time_of = (_levels(values, {name: [name] for name in numbers}) for values in (loss, time))
    groups = []
    for name, rows in members.items():
        operations = []
        for place, n in enumerate(rows):
            node = report.graph[n]
            layer = node.layer or ""
            texts = [
                values.form.format(values.values[layer]) for values in (loss, time) if values and layer in values.values
            ]
            operations.append(
                Operation(
                    y=ROW * place + ROW // 2,
                    text=_text(node),
                    values=", ".join(texts),
                    loss=loss_of.get(layer, 0),
                    time=time_of.get(layer, 0),
                    layer=numbers.get(layer),
                )
            )
        reads = dict.fromkeys(report.graph[at].group for n in rows for at in report.graph[n].inputs)
        others = tuple(other for other in reads if other != name)
        arcs = _arcs(report.graph, rows)
        groups.append(
            ModuleGroup(name, others, loss_levels.get(name, 0), time_levels.get(name, 0), tuple(operations), arcs)
        )
    return GraphPicture(tuple(groups), loss.title if loss else None, time.title if time else None)


def _levels(values: LayerValues | None, layers: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """A level from 1 to LEVELS for each group with a value, by the share of its sum in the largest sum."""
    if values is None:
        return {}
    sums = {
        name: sum(values.values[layer] for layer in found)
        for name, members in layers.items()
        if (found := [layer for layer in members if layer in values.values])
    }
    most = max(sums.values(), default=0.0)
    return {name: 1 + min(int(LEVELS * max(total, 0.0) / (most or 1.0)), LEVELS - 1) for name, total in sums.items()}


def _text(node: GraphNode) -> str:
    """The name without that of its module, and the kind."""
    if not node.module:
        return node.kind
    return f"{node.name.removeprefix(f'{node.group}.')} · {node.kind}"


def _arcs(graph: Sequence[GraphNode], rows: Sequence[int]) -> tuple[str, ...]:
    """A path for each input: straight from the row above, else an arc; inputs of other modules come from the top."""
    places = {n: place for place, n in enumerate(rows)}
    paths = []
    for place, n in enumerate(rows):
        bottom = ROW * place + ROW // 2
        for at in graph[n].inputs:
            if at not in places:
                if place:  # the first row is below the heading, which names the module that it reads
                    paths.append(_arc(0, bottom, place))
                continue
            top = ROW * places[at] + ROW // 2
            distance = place - places[at]
            paths.append(f"M{DOTS} {top}V{bottom}" if distance == 1 else _arc(top, bottom, distance))
    return tuple(paths)


def _arc(top: int, bottom: int, rows: int) -> str:
    """A curve on the left of the dots, the farther the more rows it spans."""
    x = DOTS - min(8 + 5 * rows, FARTHEST)
    return f"M{DOTS} {top}C{x} {top} {x} {bottom} {DOTS} {bottom}"
