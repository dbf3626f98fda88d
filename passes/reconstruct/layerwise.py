"""Runs a dense graph and the one being pruned side by side, node by node over all images, and stops at each layer.

A node is executed for every batch of images before the next one is. When a layer is reached, its inputs in both graphs
are known for all images, with every earlier layer already rewritten; the layer is rewritten, executed, and its inputs
are forgotten where nothing else needs them. So all layers are calibrated on pruned inputs in the time of a few forward
passes, and memory holds the values alive at one place of the graph, of all images, and never all layers' inputs.

A layer that is applied at several places, or shares its weight with another, cannot wait for inputs that its own
rewriting would change: its moments come from the dense graph, at all its places, before anything is rewritten.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import TensorMetadata
from torch.nn.modules.batchnorm import _BatchNorm

from mpcompile.analysis.eligibility import tied, weight_sites
from mpcompile.analysis.layer_interpreter import LayerInterpreter
from mpcompile.data.images import Split
from mpcompile.errors import LoadError, PassError, on_layer
from mpcompile.ir.model import Model
from mpcompile.passes.reconstruct.residual import join_after
from mpcompile.passes.reconstruct.second_moments import SecondMoments, product, rows_of
from mpcompile.system.progress import tracked
from mpcompile.system.resource_errors import available_bytes

BATCH = 16
PARTS = 4  # of the images, where what is missing at a residual sum has to be more than chance


@dataclass(frozen=True, slots=True)
class TiedWeight:
    """A weight that is due: the layers that have it, and what can take up a shift of their mean output.

    That is the layer's own bias (`biased`), or the batch normalisation that alone reads a convolution without bias.
    """

    names: tuple[str, ...]
    biased: bool
    norm: _BatchNorm | None

    @property
    def centred(self) -> bool:
        """Whether the mean of the outputs can be set freely, so that only deviations are to be fitted."""
        return self.biased or self.norm is not None


Layer = nn.Linear | nn.Conv2d
Rewrite = Callable[[TiedWeight, SecondMoments | None], None]
# Of what is missing at a residual sum how much each output is to make up for, from the moments of parts of the images;
# wanted are the layer's own dense output and what is missing.
Share = Callable[[TiedWeight, Sequence[SecondMoments]], Tensor]
Seen = list[tuple[str, Tensor, Tensor]]  # layer, input, output


class _Side:
    """One of the two graphs and the values alive in it, batch by batch."""

    def __init__(self, graph: fx.GraphModule, batches: Sequence[Tensor]) -> None:
        self.seen: Seen = []
        self.watcher = LayerInterpreter(graph, lambda name, layer, x, y: self.seen.append((name, x, y)))
        [image] = [node for node in graph.graph.nodes if node.op == "placeholder"]
        self.values: list[dict[fx.Node, Any]] = [{image: pixels.clone()} for pixels in batches]

    def execute(self, node: fx.Node, batch: int) -> Seen:
        """Runs the node on a batch, keeps its value, drops those that were used for the last time."""
        seen, self.values[batch][node] = self._run(node, batch)
        for done in self.watcher.user_to_last_uses.get(node, ()):
            del self.values[batch][done]
        return seen

    def peek(self, node: fx.Node, batch: int) -> Seen:
        """The layers' inputs and outputs at a node, which is run without consequences."""
        kept = self.values[batch]
        # Copies, since a module may write into its inputs; not of weights, which would no longer be the layer's.
        copies = {
            i: kept[i].clone() if isinstance(kept[i], Tensor) and i.op != "get_attr" else kept[i]
            for i in node.all_input_nodes
        }
        self.values[batch] = {**kept, **copies}
        seen, _ = self._run(node, batch)
        self.values[batch] = kept
        return seen

    def _run(self, node: fx.Node, batch: int) -> tuple[Seen, Any]:
        self.watcher.env = self.values[batch]
        self.seen.clear()
        value = self.watcher.run_node(node)
        return list(self.seen), value


def rewrite_in_order(
    model: Model,
    images: Split,
    names: Sequence[str],
    rewrite: Rewrite,
    sequential: bool = True,
    known: Callable[[str], bool] = lambda name: False,
    dense: fx.GraphModule | None = None,
    residual: Share | None = None,
) -> None:
    """Calls `rewrite` for each weight of these layers in order of execution, with the moments of what flows into it.

    Inputs are those of the model as it is being rewritten or, where not `sequential`, as it was. Wanted outputs are
    those of `dense`, or of the model as it was, without the bias where no bias can be set; before a residual sum, and
    where sequential, with as much of what is missing in the sum as `residual` says (passes/reconstruct/residual.py).
    Layers that the images do not reach are left out, and for those that are `known` no moments are collected. Raises
    LoadError where an image is not finite, PassError where a layer's inputs are not, or where memory cannot hold the
    images.
    """
    dense = copy.deepcopy(model.graph) if dense is None else dense
    due = _due(model, names)
    waiting = [(nodes, site) for nodes, site in due if not known(site.names[0])]
    several = {site: SecondMoments() for nodes, site in waiting if len(nodes) > 1 or len(site.names) > 1}
    _require_memory(model, len(images), sides=2 if sequential else 1)
    batches = _read(images, model)
    twins = dict(zip(model.graph.graph.nodes, dense.graph.nodes, strict=True))
    announce = tracked(due, lambda item: item[1].names[0])
    with torch.no_grad():
        if several:
            _of_dense(dense, batches, several)
        before, now = _Side(dense, batches), _Side(model.graph, batches if sequential else ())
        with before.watcher.watching(), now.watcher.watching():
            for node, twin in twins.items():
                if node.op == "placeholder":
                    continue
                here = [next(announce)[1] for nodes, _ in due if nodes[0] is node]
                collecting = [site for _, site in waiting if site in here and site not in several]
                alone = [site for site in collecting if site.names == (node.target,)]
                join = join_after(model, node) if residual and sequential and alone else None
                parts = {site: tuple(SecondMoments() for _ in range(PARTS if join else 1)) for site in collecting}
                for batch in range(len(batches)):
                    expected = before.execute(twin, batch)
                    found = now.peek(node, batch) if sequential and collecting else expected
                    missing = None
                    if join is not None:
                        missing = join.missing(before.values[batch][twins[join.other]], now.values[batch][join.other])
                    for site in collecting:
                        _collect(
                            parts[site][batch % len(parts[site])], site, model, dense, node, found, expected, missing
                        )
                for site in here:
                    with on_layer(site.names[0]):
                        moments = sum(parts[site], SecondMoments()) if site in parts else several.get(site)
                        if moments is not None and not moments.finite:
                            raise PassError("its inputs on the calibration images are not finite")
                        if moments is not None and join is not None and residual is not None:
                            share = residual(site, parts[site])
                            moments = moments.combined(torch.stack([torch.ones_like(share), share]))
                        rewrite(site, moments)
                if sequential:
                    for batch in range(len(batches)):
                        now.execute(node, batch)


def _require_memory(model: Model, images: int, sides: int) -> None:
    """Raises PassError where the values alive at one place of the graph, of all images, do not fit into memory."""
    needed = sides * images * peak_bytes(model)
    free = available_bytes()
    if free is not None and needed > free:
        fits = int(images * free / needed)
        raise PassError(
            f"calibration on {images} images holds {needed / 2**30:.1f} GiB at once, and {free / 2**30:.1f} GiB are "
            f"free; give at most {fits} images (--calibration {fits}){', or sequential: false' if sides == 2 else ''}"
        )


def peak_bytes(model: Model) -> float:
    """The most that the values alive at one node take, in bytes an image, from the shapes of the last example."""

    def size(node: fx.Node) -> float:
        meta: Any = node.meta.get("tensor_meta")
        # TensorMetadata is itself a tuple; a node with several outputs has a plain one of them.
        metas = [meta] if isinstance(meta, TensorMetadata) else meta if isinstance(meta, tuple | list) else []
        return float(sum(m.shape.numel() * m.dtype.itemsize for m in metas if isinstance(m, TensorMetadata)))

    last: dict[fx.Node, fx.Node] = {}
    for node in model.graph.graph.nodes:
        last |= dict.fromkeys(node.all_input_nodes, node)
    alive = most = 0.0
    for node in model.graph.graph.nodes:
        if node.op == "get_attr":
            continue
        alive += size(node)
        most = max(most, alive)
        alive -= sum(size(i) for i in node.all_input_nodes if last[i] is node and i.op != "get_attr")
    return most / len(model.example)


def _read(images: Split, model: Model) -> list[Tensor]:
    """All images, in batches. Raises LoadError where one is not finite."""
    batches = []
    for index, (pixels, _) in enumerate(images.batches(BATCH)):
        bad = [i for i, image in enumerate(pixels) if not image.isfinite().all()]
        if bad:
            raise LoadError(f"calibration image {index * BATCH + bad[0]} holds numbers that are not finite")
        batches.append(pixels.to(model.example.dtype))
    return batches


def sites_of(model: Model, names: Sequence[str]) -> list[TiedWeight]:
    """Where the weights of these layers are applied, in order of execution; layers without a place are left out."""
    return [site for _, site in _due(model, names)]


def _due(model: Model, names: Sequence[str]) -> list[tuple[list[fx.Node], TiedWeight]]:
    """The weights to rewrite, each with the nodes that apply it, by the first of them."""
    sites, _ = weight_sites(model.graph)
    place = {node: index for index, node in enumerate(model.graph.graph.nodes)}
    due = []
    for group in tied(model, names):
        nodes = list(dict.fromkeys(node for name in group for node in sites.get(name, ())))
        nodes.sort(key=place.__getitem__)
        if nodes:
            alone = len(nodes) == 1 and len(group) == 1 and nodes[0].op == "call_module"
            biased = alone and model.layer(group[0]).bias is not None
            norm = _norm_after(model, nodes[0], group[0]) if alone and not biased else None
            due.append((nodes, TiedWeight(group, biased, norm)))
    return sorted(due, key=lambda item: place[item[0][0]])


def _norm_after(model: Model, node: fx.Node, name: str) -> _BatchNorm | None:
    """The batch normalisation that alone reads this layer's outputs, and reads nothing else."""
    if node.target != name or len(node.users) != 1:
        return None
    [user] = node.users
    module = model.graph.get_submodule(str(user.target)) if user.op == "call_module" else None
    if not isinstance(module, _BatchNorm) or module.running_mean is None:
        return None
    readers = [n for n in model.graph.graph.nodes if n.op == "call_module" and n.target == user.target]
    return module if len(readers) == 1 else None


def _of_dense(dense: fx.GraphModule, batches: Sequence[Tensor], several: dict[TiedWeight, SecondMoments]) -> None:
    """Takes in the moments of weights that are applied at several places."""
    of = {name: moments for site, moments in several.items() for name in site.names}

    def see(name: str, layer: nn.Linear | nn.Conv2d, x: Tensor, y: Tensor) -> None:
        if name in of:
            of[name].add(layer, x, product(layer, x))

    watcher = LayerInterpreter(dense, see)
    for pixels in batches:
        watcher.run(pixels.clone())


def _collect(
    moments: SecondMoments,
    site: TiedWeight,
    model: Model,
    dense: fx.GraphModule,
    node: fx.Node,
    found: Seen,
    expected: Seen,
    missing: Tensor | None,
) -> None:
    """Takes in one batch at one node: inputs found, outputs expected and, where it is asked for, what is missing."""
    [name] = site.names
    layer, twin = model.layer(name), dense.get_submodule(name)
    assert isinstance(twin, nn.Linear | nn.Conv2d)
    for (seen, x, _), (same, x_dense, y) in zip(found, expected, strict=True):
        if seen == same == name:
            wanted = [rows_of(layer, y) if node.op == "call_module" else product(twin, x_dense)]
            moments.add(layer, x, *wanted, *([] if missing is None else [rows_of(layer, missing)]))
