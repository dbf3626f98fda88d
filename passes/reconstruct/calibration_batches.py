"""The calibration images in batches, and the memory that their values take at one point of a graph."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.shape_prop import TensorMetadata

from mpcompile.data.images import Split
from mpcompile.errors import LoadError
from mpcompile.ir.batch import arguments
from mpcompile.ir.model import Model

BATCH = 16
OPEN_COPIES = 3  # of the values of a batch while it is run: those of two graphs, and the targets made from them


@dataclass(frozen=True, slots=True)
class CalibrationBatches:
    """The inputs of a graph in batches of 16 images, each read when it is asked for.

    Attributes:
        images: the calibration images.
        dtype: of the model; floating-point inputs are converted to it.
    """

    images: Split
    dtype: torch.dtype

    def __len__(self) -> int:
        return -(-len(self.images) // BATCH)

    def size(self, index: int) -> int:
        """The number of images of a batch."""
        return min(BATCH, len(self.images) - index * BATCH)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        """The inputs of a batch. Raises LoadError if an image holds NaN or infinity."""
        first = index * BATCH
        inputs = self.images.inputs_of(self.images.order[first : first + BATCH])
        bad = [i for i, image in enumerate(inputs[0]) if not image.isfinite().all()]
        if bad:
            raise LoadError(f"calibration image {first + bad[0]} holds numbers that are not finite")
        return arguments(inputs, self.dtype)


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


def open_bytes(model: Model) -> int:
    """The memory that the batch takes that two graphs run, beside the values kept of the other batches."""
    return int(OPEN_COPIES * BATCH * peak_bytes(model))
