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
from mpcompile.passes.reconstruct.views import random_view
from mpcompile.system.distributed import share

BATCH = 16
PARTS = 4  # of the images, for cross-validation
OPEN_COPIES = 3  # of the values of a batch while it is run: those of two graphs, and the targets made from them


@dataclass(frozen=True, slots=True)
class CalibrationBatches:
    """The inputs of a graph in batches of 16 images, each read when it is asked for.

    With `views`, each batch of images is followed by so many batches of random views of the same images.

    Attributes:
        images: the calibration images.
        dtype: of the model; floating-point inputs are converted to it.
        views: the number of views of each image beside the image itself.
    """

    images: Split
    dtype: torch.dtype
    views: int = 0

    def __len__(self) -> int:
        return -(-len(self.images) // BATCH) * (1 + self.views)

    @property
    def count(self) -> int:
        """The number of images and views in all batches."""
        return len(self.images) * (1 + self.views)

    @property
    def own(self) -> tuple[int, ...]:
        """The batches that this rank runs: those of images r, r + R, …, with their views."""
        here = share()
        return tuple(index for index in range(len(self)) if index // (1 + self.views) % here.size == here.rank)

    def part(self, index: int) -> int:
        """The part of the images that a batch belongs to; an image and its views are in the same one."""
        return index // (1 + self.views) % PARTS

    def size(self, index: int) -> int:
        """The number of images of a batch."""
        return min(BATCH, len(self.images) - index // (1 + self.views) * BATCH)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        """The inputs of a batch. Raises LoadError if an image holds NaN or infinity."""
        of_images, view = divmod(index, 1 + self.views)
        first = of_images * BATCH
        inputs = self.images.inputs_of(self.images.order[first : first + BATCH])
        bad = [i for i, image in enumerate(inputs[0]) if not image.isfinite().all()]
        if bad:
            raise LoadError(f"calibration image {first + bad[0]} holds numbers that are not finite")
        if view:
            inputs = (random_view(inputs[0], f"{of_images} {view}"), *inputs[1:])
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
