"""GraphExecutor: runs a graph batch by batch up to a node, and reports the layer calls at that node."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from mpcompile.analysis.layer_interpreter import LayerInterpreter
from mpcompile.passes.reconstruct.activation_store import ActivationStore


class LayerCall(NamedTuple):
    """One application of a layer's weight to one batch; `output` is None if it was not computed."""

    name: str
    input: Tensor
    output: Tensor | None


class GraphExecutor:
    """One graph with the values, batch by batch, that later nodes still need.

    `execute` and `peek` must be called inside `with executor.interpreter.forward_hooks()`, without gradients, and with
    a batch open. `opened` first runs the nodes that were put off (`put_off`) since the batch was last open.
    """

    def __init__(
        self, graph: fx.GraphModule, store: ActivationStore, inputs: Callable[[int], Sequence[Tensor]]
    ) -> None:
        """`inputs` returns the inputs of a batch; it is called once for each batch, when it is first opened."""
        self._calls: list[LayerCall] = []
        self.interpreter = LayerInterpreter(graph, lambda name, layer, x, y: self._calls.append(LayerCall(name, x, y)))
        self._placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
        self._store, self._inputs = store, inputs
        self._put_off: list[fx.Node] = []
        self._reached: dict[int, int] = {}  # how many of these nodes have run, by batch
        self.values: dict[fx.Node, Any] = {}  # of the open batch

    def put_off(self, node: fx.Node) -> None:
        """Leaves a node to be run for each batch when the batch is opened next."""
        self._put_off.append(node)

    @contextmanager
    def opened(self, batch: int) -> Iterator[None]:
        """Within the block, `values` are those of the batch after all nodes that were put off."""
        with self._store.opened((id(self), batch)) as self.values:
            if batch not in self._reached:
                inputs = self._inputs(batch)
                self.values.update((n, one.clone()) for n, one in zip(self._placeholders, inputs, strict=True))
            for node in self._put_off[self._reached.get(batch, 0) :]:
                self.execute(node)
            self._reached[batch] = len(self._put_off)
            yield
        self.values = {}

    @torch.no_grad()
    def execute(self, node: fx.Node) -> list[LayerCall]:
        """Runs the node on the open batch, stores its value, and drops the values that no later node needs."""
        calls, self.values[node] = self._run(node)
        for unused in self.interpreter.user_to_last_uses.get(node, ()):
            del self.values[unused]
        return calls

    def layer_inputs(self, node: fx.Node) -> list[LayerCall]:
        """The layer calls at the node, which is run only if it does not just call a layer on one value."""
        name, sources = str(node.target), node.all_input_nodes
        layer = self.interpreter.module.get_submodule(name) if node.op == "call_module" else None
        if not isinstance(layer, nn.Linear | nn.Conv2d) or node.args != (*sources,) or node.kwargs:
            return self.peek(node)
        return [LayerCall(name, self.values[sources[0]], None)]

    @torch.no_grad()
    def peek(self, node: fx.Node) -> list[LayerCall]:
        """Runs the node on the open batch and discards its value, so that the node can be run again later."""
        values = self.values
        # Inputs are copied, since a module may write into them. Weights are not: the layer would no longer own them.
        copies = {
            i: values[i].clone() if isinstance(values[i], Tensor) and i.op != "get_attr" else values[i]
            for i in node.all_input_nodes
        }
        self.values = {**values, **copies}
        calls, _ = self._run(node)
        self.values = values
        return calls

    def _run(self, node: fx.Node) -> tuple[list[LayerCall], Any]:
        self.interpreter.env = self.values
        self._calls.clear()
        value = self.interpreter.run_node(node)
        return list(self._calls), value
