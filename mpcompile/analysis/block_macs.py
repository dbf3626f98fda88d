"""What a transformer costs part by part, and the paper's way of charging it beside the true one.

A graph with attentions falls into parts: each attention, up to the sum with its stream; what follows it until the
stream of the next (the MLP, which has fewer tokens where some were merged after the attention); and the rest.

- True: every part at the tokens that it has.
- As in arXiv 2606.02608: the whole block at the tokens that enter it, so that a merge saves from the next block on.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx
from torch.fx.passes.shape_prop import ShapeProp

from mpcompile.analysis.attention import Attention, ancestors, attentions, shape_of
from mpcompile.analysis.eligibility import weight_sites
from mpcompile.analysis.macs import Cost, cost
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.ir.token_merging import merge_tokens


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a graph with L attentions. `of` maps a node to 2ℓ for attention ℓ and 2ℓ + 1 for what follows it.

    `tokens` has, for each part, how many there are: 2 L numbers.
    """

    of: Mapping[fx.Node, int]
    tokens: tuple[int, ...]


def parts(graph: fx.GraphModule, example: torch.Tensor) -> Parts:
    """The parts of a graph; none where it has no attention that is added to its tokens."""
    with torch.no_grad():
        ShapeProp(graph).propagate(example)
    found = attentions(graph.graph, dict(graph.named_modules()))
    sites = list({site.total: site for site in found if site.total}.values())
    if not sites:
        return Parts({}, ())
    leaving = [_merged_after(site) for site in sites]
    of: dict[fx.Node, int] = {}
    for place, site in enumerate(sites):
        assert site.stream is not None
        assert site.total is not None
        # Before the first attention this is −1: no part.
        of |= {node: 2 * place - 1 for node in _upto(site.stream) if node not in of}
        of |= {node: 2 * place for node in _upto(site.total) if node not in of}
    last = sites[-1].tokens - leaving[-1]
    for node in graph.graph.nodes:
        if node not in of and len(shape_of(node)) == 3 and shape_of(node)[1] == last:
            of[node] = 2 * len(sites) - 1
    return Parts(
        {node: part for node, part in of.items() if part >= 0},
        tuple(n for site, r in zip(sites, leaving, strict=True) for n in (site.tokens, site.tokens - r)),
    )


def _upto(node: fx.Node) -> set[fx.Node]:
    """A node and all that it is computed from."""
    return {node, *ancestors(node)}


def _merged_after(site: Attention) -> int:
    """How many tokens are merged into others behind an attention."""
    assert site.total is not None
    merges = [user for user in site.total.users if user.target is merge_tokens]
    return int(str(merges[0].args[3])) if merges else 0


def merges(graph: fx.GraphModule, example: torch.Tensor) -> tuple[int, ...]:
    """The schedule that is written in a graph: tokens merged after each attention."""
    tokens = parts(graph, example).tokens
    return tuple(before - after for before, after in zip(tokens[::2], tokens[1::2], strict=True))


def as_published(model: Model) -> Cost:
    """The cost by the paper's convention: the whole block charged at the tokens that enter it."""
    found, divided = cost(model), parts(model.graph, model.example)
    factors = {node.name: divided.tokens[part - part % 2] / divided.tokens[part] for node, part in divided.of.items()}
    sites, _ = weight_sites(model.graph)
    return replace(
        found,
        nodes=tuple(replace(row, macs=row.macs * factors.get(row.node, 1.0)) for row in found.nodes),
        layers={
            name: macs * (factors.get(sites[name][0].name, 1.0) if name in sites else 1.0)
            for name, macs in found.layers.items()
        },
    )


@dataclass(frozen=True, slots=True)
class Charged:
    """Multiply-accumulates of one image, zeros of the patterns skipped, whatever the target makes of them.

    `compressed` is the true count; `as_published` charges each block at the tokens that enter it, as the paper does.
    Token merging itself needs `merging` more. `tokens` are those that enter each attention and those that leave the
    last; where there is no attention, none. `merged` are those that token merging takes away after each.
    """

    dense: float
    compressed: float
    as_published: float
    merging: float
    tokens: tuple[int, ...]
    merged: tuple[int, ...]


def charged(dense: Model, compressed: Model) -> Charged:
    """What a compressed model costs beside the dense one, by both conventions."""
    return charged_by(cost(dense), cost(compressed), compressed)


def charged_by(dense: Cost, found: Cost, compressed: Model) -> Charged:
    """The same of models whose costs, zeros not yet skipped, are known: `dense`, and `found` of the compressed one."""
    patterns, tokens = compressed.patterns(), parts(compressed.graph, compressed.example).tokens
    return Charged(
        dense=dense.macs,
        compressed=found.executed_macs(patterns),
        as_published=as_published(compressed).executed_macs(patterns),
        merging=found.merging_macs,
        tokens=(*tokens[::2], *tokens[-1:]),
        merged=merges(compressed.graph, compressed.example),
    )


def macs_of_parts(model: Model, patterns: Mapping[str, NM]) -> tuple[list[float], float]:
    """Multiply-accumulates of each part with these layers at their pattern, and those outside all parts."""
    found, divided = cost(model), parts(model.graph, model.example)
    sites, _ = weight_sites(model.graph)
    part_of = {node.name: part for node, part in divided.of.items()}
    sums = [0.0] * len(divided.tokens)
    for row in found.nodes:
        if row.node in part_of and not row.merging:
            sums[part_of[row.node]] += row.macs
    for name, pattern in patterns.items():
        part = divided.of.get(sites[name][0])
        if part is not None:
            sums[part] -= found.layers[name] * (1 - pattern.density)
    return sums, found.executed_macs(patterns) - sum(sums)
