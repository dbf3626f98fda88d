"""Multiply-accumulates (MACs) and bytes of a captured model, dense and as executed with the patterns in its plan.

The graph is run node by node on its example under PyTorch's FLOP counter, so all products are counted: layers,
attention, and products inside modules that tracing kept whole. One multiply-accumulate is two FLOPs of that counter.
Additions of biases, norms and activations are not counted, as is usual. All figures are for one image.

The products of token merging itself (matching tokens and averaging them) are counted separately: they are not part of
the model, and published counts leave them out.

A layer with the pattern N:M executes N/M of its multiply-accumulates if its runtime has a kernel for it, otherwise all
of them. Packed, a kept weight needs its own bits and ⌈log₂ M⌉ more for its index in the group; rows that share a
pattern share that index.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from mpcompile.analysis.eligibility import tied_layers
from mpcompile.analysis.layer_interpreter import LayerInterpreter
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.ir.token_merging import merge_tokens


@dataclass(frozen=True, slots=True)
class NodeCost:
    """One node of the graph, for one image: multiply-accumulates, and bytes of its outputs (0 for a view)."""

    node: str
    macs: float
    activation_bytes: float
    merging: bool = False  # whether the node is token merging itself


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of one image in a dense model, by node and by layer.

    Attributes:
        nodes: all nodes that compute something, in order of execution.
        layers: the multiply-accumulates of each Linear and Conv2d; the counts of the nodes include them.
        weights: the number of weights of each Linear and Conv2d, without bias; 0 if an earlier layer shares its weight.
        other_parameters: the number of all other parameters: biases, norms, embeddings.
    """

    nodes: tuple[NodeCost, ...]
    layers: Mapping[str, float]
    weights: Mapping[str, int]
    other_parameters: int

    @property
    def macs(self) -> float:
        """Multiply-accumulates of all nodes except token merging itself, every layer dense."""
        return sum((node.macs for node in self.nodes if not node.merging), 0.0)

    @property
    def merging_macs(self) -> float:
        """Multiply-accumulates of token merging itself."""
        return sum((node.macs for node in self.nodes if node.merging), 0.0)

    @property
    def activation_bytes(self) -> float:
        """Bytes of the outputs of all nodes together."""
        return sum(node.activation_bytes for node in self.nodes)

    def executed_macs(self, patterns: Mapping[str, NM]) -> float:
        """Multiply-accumulates with the layers in `patterns` executed at their pattern, and all other nodes dense."""
        return self.macs - sum(self.layers[name] * (1 - pattern.density) for name, pattern in patterns.items())

    def weight_bytes(self, patterns: Mapping[str, NM], bytes_each: int = 4) -> float:
        """Bytes of all parameters, with the layers in `patterns` packed; a value takes `bytes_each` bytes."""
        total = self.other_parameters * bytes_each + 0.0
        for name, count in self.weights.items():
            pattern = patterns.get(name)
            if pattern is None:
                total += count * bytes_each
            else:
                index_bits = math.ceil(math.log2(pattern.of)) / pattern.rows
                total += count * pattern.density * (bytes_each + index_bits / 8)
        return total


def cost(model: Model) -> Cost:
    """The cost of one image, every layer dense, counted by running the model on its example."""
    counter = _Counter(model.graph)
    batch = len(model.example)
    # The counter does not know the fused attention kernels of every device; the MATH backend runs two plain products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _unfused_attention():
        counter.run(*model.example_inputs)
    weights = {name: layer.weight.numel() for name, layer in model.layers()}
    for _, *others in tied_layers(model, list(weights)):
        weights |= dict.fromkeys(others, 0)
    total = sum(parameter.numel() for parameter in model.graph.parameters())
    return Cost(
        nodes=tuple(NodeCost(name, macs / batch, size / batch, merging) for name, macs, size, merging in counter.rows),
        layers={name: counter.layers.get(name, 0.0) / batch for name in weights},
        weights=weights,
        other_parameters=total - sum(weights.values()),
    )


@torch.no_grad()
def macs_of_run(run: Callable[[], object]) -> float:
    """The multiply-accumulates of a call of any code in PyTorch, for its whole batch."""
    from torch.utils.flop_counter import FlopCounterMode  # imports triton

    with sdpa_kernel(SDPBackend.MATH), _unfused_attention(), FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops()) / 2


@contextmanager
def _unfused_attention() -> Iterator[None]:
    """Runs nn.MultiheadAttention as plain products: the counter does not know torch's fused kernel for inference."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


class _Counter(LayerInterpreter):
    """Runs a graph and counts multiply-accumulates of each node and layer, for the whole batch."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph, self._count_layer)
        self.rows: list[tuple[str, float, int, bool]] = []  # node, multiply-accumulates, bytes written, merging
        self.layers: dict[str, float] = {}

    def _count_layer(self, name: str, layer: nn.Linear | nn.Conv2d, x: Tensor, y: Tensor) -> None:
        positions = y.numel() / layer.weight.shape[0]  # each output channel is computed once at each position
        self.layers[name] = self.layers.get(name, 0.0) + positions * layer.weight.numel()

    @contextmanager
    def forward_hooks(self) -> Iterator[None]:
        """Also keeps hooks on each nn.MultiheadAttention: it uses its output projection without calling that layer."""
        whole = [(n, m) for n, m in self.module.named_modules() if isinstance(m, nn.MultiheadAttention)]
        handles = [module.register_forward_hook(partial(self._count_projection, name)) for name, module in whole]
        try:
            with super().forward_hooks():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _count_projection(self, name: str, module: nn.Module, args: Any, outputs: tuple[Tensor, Any]) -> None:
        assert isinstance(module, nn.MultiheadAttention)
        self._count_layer(f"{name}.out_proj", module.out_proj, outputs[0], outputs[0])

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A parameter or buffer, detached: the counter would otherwise inspect how autograd made a view of it."""
        value = super().get_attr(target, args, kwargs)
        return value.detach() if isinstance(value, Tensor) else value

    def run_node(self, n: fx.Node) -> Any:
        """The node's result; its counts are added to `rows`."""
        from torch.utils.flop_counter import FlopCounterMode  # imports compilers, which importing mpcompile must not

        if n.op in ("placeholder", "get_attr", "output"):
            return super().run_node(n)
        with FlopCounterMode(display=False) as counted:
            result = super().run_node(n)
        args = self.fetch_args_kwargs_from_env(n)
        inputs = {tensor.untyped_storage().data_ptr() for tensor in _tensors(args)}
        written = (t for t in _tensors(result) if t.untyped_storage().data_ptr() not in inputs)
        size = sum(t.numel() * t.element_size() for t in written)
        self.rows.append((n.name, counted.get_total_flops() / 2, size, n.target is merge_tokens))
        return result


def _tensors(value: Any) -> list[Tensor]:
    """Every tensor in a node's arguments or result."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
