"""LayerInterpreter: runs a captured graph and reports the input and output of each layer, however it is applied.

A graph can call a layer, call it inside a module that was kept whole, or fetch its weight and call F.linear or F.conv2d
(as BEiT does). Forward hooks see the first two, the interpreter sees the third.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn

from mpcompile.analysis.eligibility import weight_nodes

LayerHook = Callable[[str, nn.Linear | nn.Conv2d, Tensor, Tensor], None]  # name, layer, input, output


class LayerInterpreter(fx.Interpreter):
    """Runs a graph and calls `hook` for each application of a Linear's or Conv2d's weight, in order of execution."""

    def __init__(self, graph: fx.GraphModule, hook: LayerHook) -> None:
        super().__init__(graph)
        self._layer_hook = hook
        self._layers = {n: m for n, m in graph.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
        applied_at, _ = weight_nodes(graph)
        self._functional = {
            node: name for name, nodes in applied_at.items() for node in nodes if node.op == "call_function"
        }

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The graph's outputs; `hook` is called for each application of a layer on the way."""
        with self.forward_hooks():
            return super().run(*args, **kwargs)

    @contextmanager
    def forward_hooks(self) -> Iterator[None]:
        """Keeps forward hooks on the layers while the context is open.

        Needed around `run_node` if single nodes are run; `run` opens the context itself.
        """
        handles = [layer.register_forward_hook(self._forward_hook(name)) for name, layer in self._layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run_node(self, n: fx.Node) -> Any:
        """The node's result; a functional call with a layer's weight is reported."""
        result = super().run_node(n)
        if n in self._functional:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            name = self._functional[n]
            self._layer_hook(name, self._layers[name], args[0] if args else kwargs["input"], result)
        return result

    def _forward_hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        """A torch forward hook that reports the layer of this name."""
        layer = self._layers[name]
        return lambda module, args, output: self._layer_hook(name, layer, args[0], output)
