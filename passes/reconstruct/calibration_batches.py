"""The calibration images as batches in memory, and the check that the activations of all of them fit there."""

from typing import Any

from torch import Tensor, fx
from torch.fx.passes.shape_prop import TensorMetadata

from mpcompile.data.images import Split
from mpcompile.errors import LoadError, PassError
from mpcompile.ir.batch import arguments
from mpcompile.ir.model import Model
from mpcompile.system.resource_errors import available_bytes

BATCH = 16


def calibration_batches(model: Model, images: Split, graphs: int) -> list[tuple[Tensor, ...]]:
    """All images in batches of 16, for running `graphs` copies of the model node by node over all of them.

    Raises PassError if the activations of all images do not fit into free memory, and LoadError if an image contains
    NaN or infinity.
    """
    _require_memory(model, len(images), graphs)
    batches: list[tuple[Tensor, ...]] = []
    for index, (inputs, _) in enumerate(images.announced(BATCH)):
        bad = [i for i, image in enumerate(inputs[0]) if not image.isfinite().all()]
        if bad:
            raise LoadError(f"calibration image {index * BATCH + bad[0]} holds numbers that are not finite")
        batches.append(arguments(inputs, model.example.dtype))
    return batches


def _require_memory(model: Model, images: int, graphs: int) -> None:
    needed = graphs * images * peak_bytes(model)
    free = available_bytes()
    if free is not None and needed > free:
        fits = int(images * free / needed)
        raise PassError(
            f"calibration on {images} images holds {needed / 2**30:.1f} GiB at once, and {free / 2**30:.1f} GiB are "
            f"free; give at most {fits} images (--calibration {fits}){', or sequential: false' if graphs == 2 else ''}"
        )


def peak_bytes(model: Model) -> float:
    """The peak size of the activations that are alive at one node, in bytes per image.

    Computed from the shapes that the last run on the example recorded in the graph.
    """

    def size(node: fx.Node) -> float:
        meta: Any = node.meta.get("tensor_meta")
        # TensorMetadata is itself a tuple; a node with several outputs has a plain tuple or list of them.
        metas = [meta] if isinstance(meta, TensorMetadata) else meta if isinstance(meta, tuple | list) else []
        return float(sum(m.shape.numel() * m.dtype.itemsize for m in metas if isinstance(m, TensorMetadata)))

    last_user: dict[fx.Node, fx.Node] = {}
    for node in model.graph.graph.nodes:
        last_user |= dict.fromkeys(node.all_input_nodes, node)
    alive = peak = 0.0
    for node in model.graph.graph.nodes:
        if node.op == "get_attr":  # weights: they are in memory anyway
            continue
        alive += size(node)
        peak = max(peak, alive)
        alive -= sum(size(i) for i in node.all_input_nodes if last_user[i] is node and i.op != "get_attr")
    return peak / len(model.example)
