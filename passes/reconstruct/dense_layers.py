"""Which layers that stay dense can make up for what masked ones before them lose.

A depthwise convolution, or a layer that a budget left dense, reads what masked layers before it give, and its own
weights still reproduce the dense model's outputs from the dense model's inputs. Fitted anew to those outputs from the
inputs that it now gets, all its weights kept (passes/reconstruct/least_squares.py), it takes back part of the loss, and
changes neither masks nor work.
"""

from collections.abc import Collection, Mapping

from mpcompile.analysis.eligibility import EXCLUDED, fact_against_any, places, tied, weight_sites
from mpcompile.ir.model import Model


def repairable(model: Model, due: Collection[str], reasons: Mapping[str, str]) -> list[str]:
    """Of the layers that stay dense, each with its reason, those that see a loss and can be fitted to make up for it.

    That is a layer that reads what a layer of `due` gives, is applied at one place, shares its weight with no other,
    and was not excluded by name. Output layers are left as they are: they see one row an image, too few to fit to.
    """
    sites, _ = weight_sites(model.graph)
    alone = {group[0] for group in tied(model, [name for name, _ in model.layers()]) if len(group) == 1}
    where, candidates, found = places(model), after(model, due) & alone, []
    for name, layer in model.layers():
        reason, place = reasons.get(name), where.get(name)
        if name not in candidates or len(sites[name]) != 1 or model.plan_of(name).mask is not None:
            continue
        if reason is None or reason.startswith(EXCLUDED):
            continue
        if place and place.layers_after and not fact_against_any(layer, place):
            found.append(name)
    return found


def after(model: Model, names: Collection[str]) -> set[str]:
    """The layers that read, at any distance, what one of these layers gives."""
    sites, _ = weight_sites(model.graph)
    moved = {node for name in names for node in sites.get(name, ())}
    reading = set()
    for node in model.graph.graph.nodes:
        if moved.intersection(node.all_input_nodes):
            moved.add(node)
            reading.add(node)
    return {name for name, nodes in sites.items() if reading.intersection(nodes)}
