"""Where activations are quantised: the values that get a quantizer, and the nodes that read the quantised value.

Every quantised layer reads a quantised input. Whether its output is quantised too depends on what the runtime's int8
kernels need:

- `convolutions`: the outputs of convolutions are quantised, after the batch normalization and the rectifier that
  runtimes fuse with them, and every reader of a value next to a convolution reads 8 bits. ONNX Runtime has int8
  convolutions only from 8 bits to 8 bits, but int8 products of Linear layers that return float32, which keeps residual
  sums and normalizations exact.
- `all`: the outputs of Linear layers are quantised as well, after their activation function. TensorRT selects sparse
  int8 products only if input and output are int8. Before a residual add, this quantises the layer's branch and leaves
  the skip branch.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mpcompile.analysis.eligibility import weight_nodes
from mpcompile.analysis.operator_sets import ELEMENTWISE_MODULES, ELEMENTWISE_NAMES
from mpcompile.ir.model import Model
from mpcompile.ir.quantization import ActivationType, Quantizer

Outputs = Literal["convolutions", "all"]
RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Identity, nn.Dropout)  # a quantised range includes their limits
RECTIFIER_NAMES = frozenset(["relu", "relu_", "relu6", "hardtanh", "clamp", "clamp_", "dropout"])
PREFIX = "quantizers"


@dataclass(frozen=True, slots=True)
class Site:
    """One value to quantise: the index of its node, and the indices of the nodes that read the quantised value."""

    value: int
    readers: tuple[int, ...]


def sites(model: Model, layers: Collection[str], outputs: Outputs) -> list[Site]:
    """The values to quantise for these layers, in order of execution."""
    nodes = list(model.graph.graph.nodes)
    index = {node: i for i, node in enumerate(nodes)}
    nodes_of, _ = weight_nodes(model.graph)
    readers: dict[fx.Node, set[fx.Node]] = {}
    for name in layers:
        convolution = isinstance(model.layer(name), nn.Conv2d)
        for node in nodes_of[name]:
            source = _input_of(node)
            readers.setdefault(source, set()).add(node)
            if convolution:
                readers[source] |= set(source.users)
            if convolution or outputs == "all":
                end = _end_of_fused(model, node, outputs)
                readers.setdefault(end, set()).update(user for user in end.users)
    return [
        Site(index[value], tuple(sorted(index[reader] for reader in readers[value])))
        for value in sorted(readers, key=index.__getitem__)
        if any(reader.op != "output" for reader in readers[value])
    ]


def _input_of(node: fx.Node) -> fx.Node:
    """The activation that a layer's node reads."""
    source = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(source, fx.Node)
    return source


def _end_of_fused(model: Model, node: fx.Node, outputs: Outputs) -> fx.Node:
    """The last node of the chain that a runtime fuses with a layer: normalization and activation function."""
    while len(node.users) == 1:
        [user] = node.users
        if not _fuses(model, user, outputs):
            break
        node = user
    return node


def _fuses(model: Model, node: fx.Node, outputs: Outputs) -> bool:
    """Whether a node is fused with the layer before it."""
    if len(node.all_input_nodes) != 1:
        return False
    if node.op == "call_module":
        module = model.graph.get_submodule(str(node.target))
        elementwise = ELEMENTWISE_MODULES if outputs == "all" else RECTIFIERS
        if isinstance(module, _BatchNorm):
            return all(isinstance(part, elementwise) for part in module.children())
        return isinstance(module, elementwise)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name in (ELEMENTWISE_NAMES if outputs == "all" else RECTIFIER_NAMES)


def insert(graph: fx.GraphModule, places: Sequence[Site], kind: ActivationType) -> list[str]:
    """Inserts a quantizer without a range at each site, in place; returns their qualified names in order.

    Graphs with the same nodes get the same quantizers.
    """
    nodes = list(graph.graph.nodes)
    names = []
    for site in places:
        value = nodes[site.value]
        name = f"{PREFIX}.{value.name}"
        graph.add_submodule(name, Quantizer(kind))
        with graph.graph.inserting_after(value):
            quantised = graph.graph.call_module(name, (value,))
        quantised.meta = dict(value.meta)
        for reader in site.readers:
            nodes[reader].replace_input_with(value, quantised)
        names.append(name)
    graph.recompile()
    return names


def quantizer_nodes(graph: fx.GraphModule) -> Mapping[str, fx.Node]:
    """The node of each quantizer, by the quantizer's qualified name."""
    modules = dict(graph.named_modules())
    return {
        str(node.target): node
        for node in graph.graph.nodes
        if node.op == "call_module" and isinstance(modules[str(node.target)], Quantizer)
    }


def quantizers_before(graph: fx.GraphModule, names: Collection[str]) -> list[str]:
    """The quantizers whose value one of these layers reads, by qualified name."""
    nodes_of, _ = weight_nodes(graph)
    by_node = {node: name for name, node in quantizer_nodes(graph).items()}
    sources = (_input_of(node) for name in names for node in nodes_of[name])
    return list(dict.fromkeys(by_node[source] for source in sources if source in by_node))
