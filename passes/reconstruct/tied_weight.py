"""TiedWeight: one weight to reconstruct, with every layer and graph node that uses it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mpcompile.analysis.eligibility import tied_layers, weight_nodes
from mpcompile.ir.model import Model

Layer = nn.Linear | nn.Conv2d


@dataclass(frozen=True, slots=True)
class TiedWeight:
    """A weight to reconstruct: the layers that share it, and what absorbs a change of its mean output.

    Attributes:
        names: qualified names of the layers that share the weight.
        nodes: the graph nodes that apply it, in order of execution; never empty.
        biased: True if the layer's own bias absorbs a change of the mean output.
        norm: for a convolution without bias, the batch normalization whose running mean absorbs it, or None.

    If the weight is applied more than once, nothing absorbs the change, since one bias cannot fit two means.
    """

    names: tuple[str, ...]
    nodes: tuple[fx.Node, ...]
    biased: bool
    norm: _BatchNorm | None

    @property
    def centred(self) -> bool:
        """Whether the mean output is free, so that the weights only need to fit deviations from the mean."""
        return self.biased or self.norm is not None

    @property
    def reused(self) -> bool:
        """Whether several nodes apply the weight, or several layers share it."""
        return len(self.nodes) > 1 or len(self.names) > 1


def tied_weights(model: Model, names: Sequence[str]) -> list[TiedWeight]:
    """The weights of these layers in order of first execution. A weight that no node applies is left out."""
    nodes_of, _ = weight_nodes(model.graph)
    order = {node: index for index, node in enumerate(model.graph.graph.nodes)}
    weights = []
    for group in tied_layers(model, names):
        nodes = list(dict.fromkeys(node for name in group for node in nodes_of.get(name, ())))
        nodes.sort(key=order.__getitem__)
        if nodes:
            called_once = len(nodes) == 1 and len(group) == 1 and nodes[0].op == "call_module"
            biased = called_once and model.layer(group[0]).bias is not None
            norm = _norm_after(model, nodes[0], group[0]) if called_once and not biased else None
            weights.append(TiedWeight(group, tuple(nodes), biased, norm))
    return sorted(weights, key=lambda weight: order[weight.nodes[0]])


def _norm_after(model: Model, node: fx.Node, name: str) -> _BatchNorm | None:
    """The batch normalization that is the layer's only reader and has no other input, or None."""
    if node.target != name or len(node.users) != 1:
        return None
    [user] = node.users
    module = model.graph.get_submodule(str(user.target)) if user.op == "call_module" else None
    if not isinstance(module, _BatchNorm) or module.running_mean is None:
        return None
    calls = [n for n in model.graph.graph.nodes if n.op == "call_module" and n.target == user.target]
    return module if len(calls) == 1 else None


@torch.no_grad()
def write(weight: TiedWeight, layer: Layer, result: Mapping[str, Tensor]) -> None:
    """Copies `result["weight"]` into the layer, and `result["bias"]`, if present, into its bias or its batch norm."""
    layer.weight.copy_(result["weight"])
    if "bias" not in result:
        return
    if weight.biased and layer.bias is not None:
        layer.bias.copy_(result["bias"])
    elif weight.norm is not None and weight.norm.running_mean is not None:
        # Adding b to the input of a batch normalization equals subtracting b from its running mean.
        weight.norm.running_mean -= result["bias"].to(weight.norm.running_mean.dtype)
