"""Layer-wise calibration: stops at each layer with the second moments of the inputs it gets from the pruned layers.

The dense graph and the graph being pruned run side by side, one node at a time over all calibration images. When the
run reaches a layer, its inputs in both graphs are known for all images, and every earlier layer has already been
rewritten. The caller rewrites the layer; the run then executes it and drops the activations that no later node needs.
So all layers are calibrated on pruned inputs in the time of a few forward passes. Memory holds the activations of all
images at one point of the graph, never the inputs of all layers.

A weight that several nodes apply is an exception: rewriting it at its first node would change its own later inputs. Its
moments are those of the dense graph, over all its nodes, collected before anything is rewritten.
"""

import copy
from collections.abc import Callable, Container, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from mpcompile.analysis.layer_interpreter import LayerInterpreter
from mpcompile.data.images import Split
from mpcompile.errors import PassError, on_layer
from mpcompile.ir.model import Model
from mpcompile.ir.quantization import quantizers
from mpcompile.passes.reconstruct.calibration_batches import calibration_batches
from mpcompile.passes.reconstruct.graph_executor import GraphExecutor, LayerCall
from mpcompile.passes.reconstruct.layer_rows import product, rows_of
from mpcompile.passes.reconstruct.residual import residual_add_after
from mpcompile.passes.reconstruct.sampled_positions import positions_per_image, sampled_positions
from mpcompile.passes.reconstruct.second_moments import SecondMoments
from mpcompile.passes.reconstruct.tied_weight import Layer, TiedWeight, tied_weights
from mpcompile.system.progress import tracked

PARTS = 4  # of the calibration images, for cross-validation


@dataclass(frozen=True, slots=True)
class LayerStep:
    """One stop of `layerwise`: a weight to rewrite, and the second moments to fit it to.

    Attributes:
        weight: the weight, and the layers that share it.
        layer: the first of these layers, in the graph being rewritten.
        moments: inputs and target outputs over all calibration images; None if the weight is in `finished`.
        parts: the same moments of 4 disjoint parts of the images; empty for a weight that several nodes apply. Before a
            residual add, moments have 2 targets: the dense output, and the residual error at the add
            (passes/reconstruct/residual.py).
    """

    weight: TiedWeight
    layer: Layer
    moments: SecondMoments | None
    parts: tuple[SecondMoments, ...] = ()


def layerwise(
    model: Model,
    dense: fx.GraphModule | None,
    images: Split,
    names: Sequence[str],
    *,
    sequential: bool = True,
    residual: bool = False,
    finished: Container[str] = (),
    calibrate: Callable[[str, Sequence[Tensor]], None] | None = None,
) -> Generator[LayerStep, None, None]:
    """Yields a LayerStep for each weight of the layers `names`, in order of execution.

    Protocol: between two steps the caller rewrites the weight of the step, with its bias or norm, in place, and nothing
    else in the graph:

        for step in layerwise(model, dense, images, names):
            write(step.weight, step.layer, solve(step))

    The next layer is calibrated on the outputs of the rewritten one. While the generator is open, forward hooks observe
    the layers of both graphs. Leaving the loop early (break, exception) closes the generator and removes them. Nothing
    runs before the first step. A step holds large moments: delete it before the next one to lower the peak of memory.

    Args:
        model: its graph is the one being rewritten.
        dense: the graph whose outputs are the targets; if None, a copy of the model's graph at the first step.
        images: the calibration images.
        names: qualified names of the layers to rewrite. Layers that the images do not reach are left out.
        sequential: if False, inputs are those of the dense graph.
        residual: if True, steps before a residual add carry the residual error as a second target. Needs `sequential`.
        finished: weights, by the name of their first layer, for which no moments are collected.
        calibrate: called with the name of each quantizer (mpcompile/ir/quantization.py) and its inputs, batch by
            batch, before the quantizer runs in the graph being rewritten. It sets the range. Needs `sequential`.

    Raises:
        LoadError: an image is not finite.
        PassError: the inputs of a layer are not finite, or memory cannot hold the activations of all images.
    """
    dense = copy.deepcopy(model.graph) if dense is None else dense
    weights = tied_weights(model, names)
    unfinished = [weight for weight in weights if weight.names[0] not in finished]
    batches = calibration_batches(model, images, graphs=2 if sequential else 1)
    reused = {weight: SecondMoments() for weight in unfinished if weight.reused}
    if reused:
        _collect_from_dense(dense, batches, reused)
    dense_nodes = dict(zip(model.graph.graph.nodes, dense.graph.nodes, strict=True))
    dense_run, pruned_run = GraphExecutor(dense, batches), GraphExecutor(model.graph, batches if sequential else ())
    to_calibrate = quantizers(model.graph)
    announced = tracked(weights, lambda weight: weight.names[0], "layers")
    with dense_run.interpreter.forward_hooks(), pruned_run.interpreter.forward_hooks():
        for node, dense_node in dense_nodes.items():
            if node.op == "placeholder":
                continue
            if calibrate is not None and node.op == "call_module" and node.target in to_calibrate:
                [source] = node.all_input_nodes
                calibrate(str(node.target), [values[source] for values in pruned_run.values])
            reached = [next(announced) for weight in weights if weight.nodes[0] is node]
            collecting = [weight for weight in reached if weight in unfinished and not weight.reused]
            is_layer = any(weight.names == (node.target,) for weight in collecting)
            add = residual_add_after(model, node) if residual and sequential and is_layer else None
            parts = {weight: tuple(SecondMoments() for _ in range(PARTS)) for weight in collecting}
            for batch in range(len(batches)):
                dense_calls = dense_run.execute(dense_node, batch)
                calls = pruned_run.layer_inputs(node, batch) if sequential and collecting else dense_calls
                error = None
                if add is not None:
                    dense_skip = dense_run.values[batch][dense_nodes[add.skip]]
                    error = add.error_at_layer(dense_skip, pruned_run.values[batch][add.skip])
                for weight in collecting:
                    rows = _Rows(len(images), len(batches[batch][0]), f"{weight.names[0]} {batch}")
                    _collect(parts[weight][batch % PARTS], rows, weight, model, dense, node, calls, dense_calls, error)
            for weight in reached:
                yield _step(model, weight, parts.pop(weight, ()), reused.pop(weight, None))
            if sequential:
                for batch in range(len(batches)):
                    pruned_run.execute(node, batch)


def _step(
    model: Model, weight: TiedWeight, parts: tuple[SecondMoments, ...], of_reused: SecondMoments | None
) -> LayerStep:
    """The step for a weight, from the moments of its parts or of a reused weight. Raises PassError if not finite."""
    name = weight.names[0]
    with on_layer(name):
        moments = sum(parts, SecondMoments()) if parts else of_reused
        if moments is not None and not moments.finite:
            raise PassError("its inputs on the calibration images are not finite")
    return LayerStep(weight, model.layer(name), moments, parts)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Which rows of a batch enter the moments: `images` of all, `batch` of them here, `key` for the random draw."""

    images: int
    batch: int
    key: str

    def positions(self, layer: Layer, x: Tensor, rows: int) -> Tensor | None:
        """The positions to sample, for inputs `x` that unfold to `rows` rows; None for all."""
        available, rest = divmod(rows, self.batch)
        columns = layer.weight[0].numel()
        count = positions_per_image(available, columns, self.images)
        # A Conv2d applied to crops, say, has several of them for an image.
        by_image = not rest and (isinstance(layer, nn.Linear) or len(x) == self.batch)
        if not by_image or count == available:
            return None
        return sampled_positions(available, count, self.batch, self.key)


@torch.no_grad()
def _collect_from_dense(
    dense: fx.GraphModule, batches: Sequence[tuple[Tensor, ...]], reused: dict[TiedWeight, SecondMoments]
) -> None:
    """Adds the inputs and outputs of weights that several nodes apply, from a run of the dense graph."""
    moments_of = {name: moments for weight, moments in reused.items() for name in weight.names}

    def add(name: str, layer: Layer, x: Tensor, y: Tensor) -> None:
        if name in moments_of:
            moments_of[name].add(layer, x, product(layer, x))

    interpreter = LayerInterpreter(dense, add)
    for batch in batches:
        interpreter.run(*(one.clone() for one in batch))


@torch.no_grad()
def _collect(
    moments: SecondMoments,
    rows: _Rows,
    weight: TiedWeight,
    model: Model,
    dense: fx.GraphModule,
    node: fx.Node,
    calls: Sequence[LayerCall],
    dense_calls: Sequence[LayerCall],
    error: Tensor | None,
) -> None:
    """Adds a batch at one node: inputs of the pruned graph, outputs of the dense one and, if given, residual error."""
    [name] = weight.names
    layer, dense_layer = model.layer(name), dense.get_submodule(name)
    assert isinstance(dense_layer, nn.Linear | nn.Conv2d)
    for call, dense_call in zip(calls, dense_calls, strict=True):
        if call.name == dense_call.name == name:
            # If the graph fetches the weight, its bias cannot be set, so the target leaves the bias out.
            called = node.op == "call_module"
            assert dense_call.output is not None
            target = rows_of(layer, dense_call.output) if called else product(dense_layer, dense_call.input)
            targets = [target] if error is None else [target, rows_of(layer, error)]
            moments.add(layer, call.input, *targets, positions=rows.positions(layer, call.input, len(target)))
