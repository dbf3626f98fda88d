"""LayerInterpreter: runs a captured graph and reports the input and output of each layer, however it is applied.

A graph may call a layer, call it inside a module that was kept whole, or fetch its weight and multiply by that (as
BEiT does). Hooks see the first two, the interpreter the third.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn

from mpcompile.analysis.eligibility import weight_sites

LayerHook = Callable[[str, nn.Linear | nn.Conv2d, Tensor, Tensor], None]  # name, layer, input, output


class LayerInterpreter(fx.Interpreter):
    """Runs the graph, telling `see` of every application of a layer's weight, in order of execution."""

    def __init__(self, graph: fx.GraphModule, see: LayerHook) -> None:
        super().__init__(graph)
        self._see = see
        self._layers = {n: m for n, m in graph.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
        found, _ = weight_sites(graph)
        self._fetched = {node: name for name, nodes in found.items() for node in nodes if node.op == "call_function"}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The graph's outputs."""
        with self.watching():
            return super().run(*args, **kwargs)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, single nodes may be run; `run` does it by itself."""
        handles = [layer.register_forward_hook(self._hook(name)) for name, layer in self._layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run_node(self, n: fx.Node) -> Any:
        """The node's result."""
        result = super().run_node(n)
        if n in self._fetched:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            name = self._fetched[n]
            self._see(name, self._layers[name], args[0] if args else kwargs["input"], result)
        return result

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        layer = self._layers[name]
        return lambda module, args, output: self._see(name, layer, args[0], output)
