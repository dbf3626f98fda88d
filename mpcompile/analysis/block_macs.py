"""MACs of each transformer block, counted exactly and by the paper's convention (tokens entering the block).

A graph with attentions is divided into parts: each attention, up to its residual add; the nodes from there to the
stream of the next attention (the MLP, which has fewer tokens if some were merged after the attention); and the rest,
which belongs to no part.

- Exact count: each part with the number of tokens that it processes.
- Convention of arXiv 2606.02608: the whole block with the number of tokens that enter it, so that a merge saves MACs
  only from the next block on.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx
from torch.fx.passes.shape_prop import ShapeProp

from mpcompile.analysis.attention import Attention, ancestors, attentions, shape_of
from mpcompile.analysis.charged import Charged
from mpcompile.analysis.eligibility import weight_nodes
from mpcompile.analysis.macs import Cost, cost
from mpcompile.ir.batch import Tensors, arguments
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.ir.token_merging import merge_tokens


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a graph with L attentions.

    Attributes:
        part_of: the part of each node: 2ℓ for attention ℓ (counted from 0), 2ℓ + 1 for the nodes after it.
        tokens: the number of tokens in each part, 2 L numbers.
    """

    part_of: Mapping[fx.Node, int]
    tokens: tuple[int, ...]


def parts(graph: fx.GraphModule, example: Tensors) -> Parts:
    """The parts of a graph; empty if no attention is added to a residual stream. Runs ShapeProp on the example."""
    with torch.no_grad():
        ShapeProp(graph).propagate(*arguments(example))
    found = attentions(graph.graph, dict(graph.named_modules()))
    # Parallel attentions that share a residual add are one block.
    blocks = list({attention.total: attention for attention in found if attention.total}.values())
    if not blocks:
        return Parts({}, ())
    merged = [_merged_after(block) for block in blocks]
    part_of: dict[fx.Node, int] = {}
    for index, block in enumerate(blocks):
        assert block.stream is not None
        assert block.total is not None
        # Nodes before the first attention get −1, which is no part.
        part_of |= {node: 2 * index - 1 for node in _with_ancestors(block.stream) if node not in part_of}
        part_of |= {node: 2 * index for node in _with_ancestors(block.total) if node not in part_of}
    last_tokens = blocks[-1].tokens - merged[-1]
    for node in graph.graph.nodes:
        if node not in part_of and len(shape_of(node)) == 3 and shape_of(node)[1] == last_tokens:
            part_of[node] = 2 * len(blocks) - 1
    return Parts(
        {node: part for node, part in part_of.items() if part >= 0},
        tuple(n for block, r in zip(blocks, merged, strict=True) for n in (block.tokens, block.tokens - r)),
    )


def _with_ancestors(node: fx.Node) -> set[fx.Node]:
    """A node and all nodes that it is computed from."""
    return {node, *ancestors(node)}


def _merged_after(attention: Attention) -> int:
    """The number of tokens that are merged into others after an attention."""
    assert attention.total is not None
    merges = [user for user in attention.total.users if user.target is merge_tokens]
    return int(str(merges[0].args[3])) if merges else 0


def merges(graph: fx.GraphModule, example: Tensors) -> tuple[int, ...]:
    """The token merging schedule of a graph: the number of tokens merged after each attention; () without attention."""
    tokens = parts(graph, example).tokens
    return tuple(before - after for before, after in zip(tokens[::2], tokens[1::2], strict=True))


def as_published(model: Model) -> Cost:
    """The cost of one image by the paper's convention: each block counts with the number of tokens that enter it."""
    exact, divided = cost(model), parts(model.graph, model.example_inputs)
    tokens = divided.tokens
    factors = {node.name: tokens[part - part % 2] / tokens[part] for node, part in divided.part_of.items()}
    applied_at, _ = weight_nodes(model.graph)
    return replace(
        exact,
        nodes=tuple(replace(row, macs=row.macs * factors.get(row.node, 1.0)) for row in exact.nodes),
        layers={
            name: macs * (factors.get(applied_at[name][0].name, 1.0) if name in applied_at else 1.0)
            for name, macs in exact.layers.items()
        },
    )


def charged(dense: Model, compressed: Model) -> Charged:
    """The MACs of one image in a dense and in a compressed model, by both conventions."""
    return charged_from_costs(cost(dense), cost(compressed), compressed)


def charged_from_costs(dense: Cost, compressed_cost: Cost, compressed: Model) -> Charged:
    """The same as `charged`, if the costs of both models are known already: those that `cost` returned.

    `dense` and `compressed_cost` are these costs; `compressed` is the compressed model.
    """
    patterns, tokens = compressed.patterns(), parts(compressed.graph, compressed.example_inputs).tokens
    return Charged(
        dense=dense.macs,
        compressed=compressed_cost.executed_macs(patterns),
        as_published=as_published(compressed).executed_macs(patterns),
        merging=compressed_cost.merging_macs,
        tokens=(*tokens[::2], *tokens[-1:]),
        merged=merges(compressed.graph, compressed.example_inputs),
    )


def macs_of_parts(model: Model, patterns: Mapping[str, NM]) -> tuple[list[float], float]:
    """The MACs of each part (2 L numbers) and the MACs outside all parts, for one image.

    The layers in `patterns` are executed at their pattern, all others dense. Token merging itself is not counted.
    """
    dense, divided = cost(model), parts(model.graph, model.example_inputs)
    applied_at, _ = weight_nodes(model.graph)
    part_of = {node.name: part for node, part in divided.part_of.items()}
    sums = [0.0] * len(divided.tokens)
    for row in dense.nodes:
        if row.node in part_of and not row.merging:
            sums[part_of[row.node]] += row.macs
    for name, pattern in patterns.items():
        part = divided.part_of.get(applied_at[name][0])
        if part is not None:
            sums[part] -= dense.layers[name] * (1 - pattern.density)
    return sums, dense.executed_macs(patterns) - sum(sums)
