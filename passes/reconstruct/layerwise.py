"""Layer-wise calibration: stops at each layer with the second moments of the inputs it gets from the pruned layers.

The dense graph and the graph being pruned run side by side, from one layer to the next over all calibration images.
When the run reaches a layer, its inputs in both graphs are known for all images, and every earlier layer has already
been rewritten. The caller rewrites the layer; the run then executes it and drops the activations that no later node
needs. So all layers are calibrated on pruned inputs in the time of a few forward passes. What is kept are the
activations of all images at one point of the graph, never the inputs of all layers: in memory, and beyond its limit
(mpcompile/system/memory.py) in files.

In a process group (mpcompile/system/distributed.py) each rank runs its own batches, and the moments are summed over
the ranks (passes/reconstruct/shared_moments.py), so every rank yields the same steps.

A weight that several nodes apply is an exception: rewriting it at its first node would change its own later inputs. Its
moments are those of the dense graph, over all its nodes, collected before anything is rewritten.
"""

import copy
from collections.abc import Callable, Container, Generator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpcompile.analysis.layer_interpreter import LayerInterpreter
from mpcompile.data.images import Split
from mpcompile.errors import PassError, on_layer
from mpcompile.ir.model import Model
from mpcompile.ir.quantization import quantizers
from mpcompile.passes.reconstruct.activation_store import activation_store
from mpcompile.passes.reconstruct.calibration_batches import CalibrationBatches, open_bytes
from mpcompile.passes.reconstruct.graph_executor import GraphExecutor, LayerCall
from mpcompile.passes.reconstruct.layer_rows import product, rows_of
from mpcompile.passes.reconstruct.residual import residual_add_after
from mpcompile.passes.reconstruct.sampled_positions import positions_per_image, sampled_positions
from mpcompile.passes.reconstruct.second_moments import SecondMoments, solving_bytes
from mpcompile.passes.reconstruct.shared_moments import PARTS, own_batches, shared
from mpcompile.passes.reconstruct.tied_weight import Layer, TiedWeight, tied_weights
from mpcompile.system.progress import tracked


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
        PassError: the inputs of a layer are not finite.
    """
    dense = copy.deepcopy(model.graph) if dense is None else dense
    weights = tied_weights(model, names)
    unfinished = [weight for weight in weights if weight.names[0] not in finished]
    batches = CalibrationBatches(images, model.example.dtype)
    own = own_batches(len(batches))
    reused = {weight: _empty_parts() for weight in unfinished if weight.reused}
    if reused:
        _collect_from_dense(dense, batches, own, reused)
    dense_nodes = dict(zip(model.graph.graph.nodes, dense.graph.nodes, strict=True))
    inputs = lru_cache(maxsize=1)(batches.__getitem__)  # both graphs open a batch one after the other
    to_calibrate = quantizers(model.graph) if calibrate is not None else {}
    announced = tracked(weights, lambda weight: weight.names[0], "layers")
    solving = max((solving_bytes(model.layer(weight.names[0])) for weight in weights), default=0)
    with activation_store((dense, model.graph), model.example.device, solving + open_bytes(model)) as store:
        dense_run, pruned_run = (GraphExecutor(graph, store, inputs) for graph in (dense, model.graph))
        with dense_run.interpreter.forward_hooks(), pruned_run.interpreter.forward_hooks():
            for node, dense_node in dense_nodes.items():
                if node.op == "placeholder":
                    continue
                if calibrate is not None and node.op == "call_module" and node.target in to_calibrate:
                    [source] = node.all_input_nodes
                    calibrate(str(node.target), _ValuesOf(source, pruned_run, own))
                reached = [next(announced) for weight in weights if weight.nodes[0] is node]
                collecting = [weight for weight in reached if weight in unfinished and not weight.reused]
                is_layer = any(weight.names == (node.target,) for weight in collecting)
                add = residual_add_after(model, node) if residual and sequential and is_layer else None
                parts = {weight: _empty_parts() for weight in collecting}
                for batch in tracked(own, "batch {}".format, "images", batches.size) if collecting else ():
                    with dense_run.opened(batch), pruned_run.opened(batch) if sequential else nullcontext():
                        dense_calls = dense_run.execute(dense_node)
                        calls = pruned_run.layer_inputs(node) if sequential else dense_calls
                        error = None
                        if add is not None:
                            error = add.error_at_layer(
                                dense_run.values[dense_nodes[add.skip]], pruned_run.values[add.skip]
                            )
                        for weight, own_parts in parts.items():
                            rows = _Rows(len(images), batches.size(batch), f"{weight.names[0]} {batch}")
                            part = own_parts[batch % PARTS]
                            _collect(part, rows, weight, model, dense, node, calls, dense_calls, error)
                if not collecting:
                    dense_run.put_off(dense_node)
                for weight in reached:
                    yield _step(model, weight, parts.pop(weight, ()), reused.pop(weight, None))
                if sequential:
                    pruned_run.put_off(node)


def _empty_parts() -> tuple[SecondMoments, ...]:
    """Moments of each part of the images, before any batch."""
    return tuple(SecondMoments() for _ in range(PARTS))


@dataclass(frozen=True, slots=True)
class _ValuesOf(Sequence[Tensor]):
    """The values of a node for each batch of this rank, read when they are asked for."""

    node: fx.Node
    run: GraphExecutor
    batches: Sequence[int]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: Any) -> Any:
        with self.run.opened(self.batches[index]):
            return self.run.values[self.node]


def _step(
    model: Model,
    weight: TiedWeight,
    parts: tuple[SecondMoments, ...],
    of_reused: tuple[SecondMoments, ...] | None,
) -> LayerStep:
    """The step for a weight, from the moments of its parts or of a reused weight. Raises PassError if not finite."""
    name = weight.names[0]
    with on_layer(name):
        parts, of_reused = shared(parts), shared(of_reused or ())
        moments = sum(parts or of_reused, SecondMoments()) if parts or of_reused else None
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
    dense: fx.GraphModule,
    batches: CalibrationBatches,
    own: Sequence[int],
    reused: dict[TiedWeight, tuple[SecondMoments, ...]],
) -> None:
    """Adds the inputs and outputs of weights that several nodes apply, from a run of the dense graph on own batches."""
    parts_of = {name: parts for weight, parts in reused.items() for name in weight.names}
    part = 0

    def add(name: str, layer: Layer, x: Tensor, y: Tensor) -> None:
        if name in parts_of:
            parts_of[name][part].add(layer, x, product(layer, x))

    interpreter = LayerInterpreter(dense, add)
    for batch in own:
        part = batch % PARTS
        interpreter.run(*batches[batch])


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
