"""Multiply-accumulates and bytes of a captured model, dense and as executed with the patterns in its plan.

Counted by running the graph node by node on its example under PyTorch's own FLOP counter, so every product counts:
layers, attention, products inside modules that tracing kept whole. One multiply-accumulate is two of its FLOPs;
additions of biases, norms and activations are not counted, as is usual. All figures are for one image.

What token merging itself multiplies (finding partners and adding tokens up) is counted apart: it is no part of the
model, and no convention charges it.

A layer with the pattern N:M executes N/M of its multiply-accumulates where its runtime has a kernel for it, and all of
them where not. Packed, a kept weight needs its own bits and ⌈log₂ M⌉ more for its place in the group; `rows` rows that
share a pattern share that place.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from mpcompile.analysis.layer_interpreter import LayerInterpreter
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.ir.token_merging import merge_tokens


@dataclass(frozen=True, slots=True)
class NodeCost:
    """One node of the graph, for one image: multiply-accumulates, and bytes of what it writes (a view: none)."""

    node: str
    macs: float
    activation_bytes: float
    merging: bool = False  # whether it merges tokens


@dataclass(frozen=True, slots=True)
class Cost:
    """What one image costs: every node, and what of it each Linear and Conv2d does.

    `layers` maps a layer to its multiply-accumulates, `weights` to its number of weights (without bias; 0 where it
    shares them with a layer before it).
    """

    nodes: tuple[NodeCost, ...]
    layers: Mapping[str, float]
    weights: Mapping[str, int]
    other_parameters: int  # biases, norms, embeddings

    @property
    def macs(self) -> float:
        """Multiply-accumulates of the dense model, without those of token merging itself."""
        return sum((node.macs for node in self.nodes if not node.merging), 0.0)

    @property
    def merging_macs(self) -> float:
        """Multiply-accumulates of token merging itself."""
        return sum((node.macs for node in self.nodes if node.merging), 0.0)

    @property
    def activation_bytes(self) -> float:
        """Bytes that all nodes together write, in float32."""
        return sum(node.activation_bytes for node in self.nodes)

    def executed_macs(self, patterns: Mapping[str, NM]) -> float:
        """Multiply-accumulates with these layers executed at their pattern; every other node is dense."""
        return self.macs - sum(self.layers[name] * (1 - pattern.density) for name, pattern in patterns.items())

    def weight_bytes(self, patterns: Mapping[str, NM], bytes_each: int = 4) -> float:
        """Bytes of all parameters with these layers packed, `bytes_each` a number."""
        total = self.other_parameters * bytes_each + 0.0
        for name, count in self.weights.items():
            pattern = patterns.get(name)
            if pattern is None:
                total += count * bytes_each
            else:
                place_bits = math.ceil(math.log2(pattern.of)) / pattern.rows
                total += count * pattern.density * (bytes_each + place_bits / 8)
        return total


def cost(model: Model) -> Cost:
    """What one image costs in the dense model, counted on the example."""
    counter = _Counter(model.graph)
    batch = len(model.example)
    # Fused attention has kernels that the counter does not know on every device; taken apart it is two products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        counter.run(model.example)
    weights: dict[str, int] = {}
    seen: set[int] = set()
    for name, layer in model.layers():
        weights[name] = 0 if id(layer.weight) in seen else layer.weight.numel()
        seen.add(id(layer.weight))
    total = sum(parameter.numel() for parameter in model.graph.parameters())
    return Cost(
        nodes=tuple(NodeCost(name, macs / batch, size / batch, merging) for name, macs, size, merging in counter.rows),
        layers={name: counter.layers.get(name, 0.0) / batch for name in weights},
        weights=weights,
        other_parameters=total - sum(weights.values()),
    )


class _Counter(LayerInterpreter):
    """Runs a graph and counts, node by node and layer by layer."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph, self._count_layer)
        self.rows: list[tuple[str, float, int, bool]] = []
        self.layers: dict[str, float] = {}

    def _count_layer(self, name: str, layer: nn.Linear | nn.Conv2d, x: Tensor, y: Tensor) -> None:
        positions = y.numel() / layer.weight.shape[0]  # at each of them every filter is applied once
        self.layers[name] = self.layers.get(name, 0.0) + positions * layer.weight.numel()

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A parameter or buffer, out of reach of autograd: the counter wants to know how a view of one was made."""
        value = super().get_attr(target, args, kwargs)
        return value.detach() if isinstance(value, Tensor) else value

    def run_node(self, n: fx.Node) -> Any:
        """The node's result; its count is kept."""
        from torch.utils.flop_counter import FlopCounterMode  # loads compilers, as importing mpcompile must not

        if n.op in ("placeholder", "get_attr", "output"):
            return super().run_node(n)
        with FlopCounterMode(display=False) as counted:
            result = super().run_node(n)
        args = self.fetch_args_kwargs_from_env(n)
        given = {tensor.untyped_storage().data_ptr() for tensor in _tensors(args)}
        written = (t for t in _tensors(result) if t.untyped_storage().data_ptr() not in given)
        size = sum(t.numel() * t.element_size() for t in written)
        self.rows.append((n.name, counted.get_total_flops() / 2, size, n.target is merge_tokens))
        return result


def _tensors(value: Any) -> list[Tensor]:
    """Every tensor in a node's arguments or result."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
