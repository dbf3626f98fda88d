"""Dense layers that can compensate for masked layers before them.

A depthwise convolution, or a layer that a budget left dense, reads the outputs of masked layers, but its own weights
are still those that give the dense model's outputs on the dense model's inputs. Refitted to those outputs on its pruned
inputs, with all its weights kept (passes/reconstruct/least_squares.py), it undoes a part of the error. Masks and
multiply-accumulates stay the same.
"""

from collections.abc import Collection, Mapping

from mpcompile.analysis.eligibility import EXCLUDED, graph_positions, reason_uneditable, tied_layers, weight_nodes
from mpcompile.ir.model import Model


def layers_to_repair(model: Model, masked: Collection[str], reasons: Mapping[str, str]) -> list[str]:
    """The dense layers to refit, of those in `reasons` (qualified name -> why the layer stays dense).

    A layer is refitted if it is downstream of a layer in `masked`, is applied by one node, shares its weight with no
    other layer, and was not excluded by name. Output layers are not: they see one row per image, too few to fit to.
    """
    nodes_of, _ = weight_nodes(model.graph)
    untied = {group[0] for group in tied_layers(model, [name for name, _ in model.layers()]) if len(group) == 1}
    positions, candidates = graph_positions(model), layers_downstream(model, masked) & untied
    selected = []
    for name, layer in model.layers():
        reason, position = reasons.get(name), positions.get(name)
        if name not in candidates or len(nodes_of[name]) != 1 or model.plan_of(name).mask is not None:
            continue
        if reason is None or reason.startswith(EXCLUDED):
            continue
        if position and position.layers_after and not reason_uneditable(layer, position):
            selected.append(name)
    return selected


def layers_downstream(model: Model, names: Collection[str]) -> set[str]:
    """The layers whose inputs depend on the output of one of these layers."""
    nodes_of, _ = weight_nodes(model.graph)
    sources = {node for name in names for node in nodes_of.get(name, ())}
    downstream = set()
    for node in model.graph.graph.nodes:
        if sources.intersection(node.all_input_nodes):
            sources.add(node)
            downstream.add(node)
    return {name for name, nodes in nodes_of.items() if downstream.intersection(nodes)}
