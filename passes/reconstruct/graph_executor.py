"""GraphExecutor: runs a graph one node at a time over all batches, and reports the layer calls at each node."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from mpcompile.analysis.layer_interpreter import LayerInterpreter


class LayerCall(NamedTuple):
    """One application of a layer's weight to one batch; `output` is None if it was not computed."""

    name: str
    input: Tensor
    output: Tensor | None


class GraphExecutor:
    """One graph with the activations, batch by batch, that later nodes still need.

    `execute` and `peek` must be called inside `with executor.interpreter.forward_hooks()`, and without gradients.
    """

    def __init__(self, graph: fx.GraphModule, batches: Sequence[tuple[Tensor, ...]]) -> None:
        self._calls: list[LayerCall] = []
        self.interpreter = LayerInterpreter(graph, lambda name, layer, x, y: self._calls.append(LayerCall(name, x, y)))
        inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        self.values: list[dict[fx.Node, Any]] = [
            {node: one.clone() for node, one in zip(inputs, batch, strict=True)} for batch in batches
        ]

    @torch.no_grad()
    def execute(self, node: fx.Node, batch: int) -> list[LayerCall]:
        """Runs the node on one batch, stores its value, and drops the values that no later node needs."""
        calls, self.values[batch][node] = self._run(node, batch)
        for unused in self.interpreter.user_to_last_uses.get(node, ()):
            del self.values[batch][unused]
        return calls

    def layer_inputs(self, node: fx.Node, batch: int) -> list[LayerCall]:
        """The layer calls at the node, which is run only if it does not just call a layer on one value."""
        name, sources = str(node.target), node.all_input_nodes
        layer = self.interpreter.module.get_submodule(name) if node.op == "call_module" else None
        if not isinstance(layer, nn.Linear | nn.Conv2d) or node.args != (*sources,) or node.kwargs:
            return self.peek(node, batch)
        return [LayerCall(name, self.values[batch][sources[0]], None)]

    @torch.no_grad()
    def peek(self, node: fx.Node, batch: int) -> list[LayerCall]:
        """Runs the node on one batch and discards its value, so that the node can be run again later."""
        values = self.values[batch]
        # Inputs are copied, since a module may write into them. Weights are not: the layer would no longer own them.
        copies = {
            i: values[i].clone() if isinstance(values[i], Tensor) and i.op != "get_attr" else values[i]
            for i in node.all_input_nodes
        }
        self.values[batch] = {**values, **copies}
        calls, _ = self._run(node, batch)
        self.values[batch] = values
        return calls

    def _run(self, node: fx.Node, batch: int) -> tuple[list[LayerCall], Any]:
        self.interpreter.env = self.values[batch]
        self._calls.clear()
        value = self.interpreter.run_node(node)
        return list(self._calls), value
