"""A key that identifies a training, so that only a run that would compute the same continues from a checkpoint."""

import hashlib
from dataclasses import replace

import numpy as np

from mpcompile.data.images import Split
from mpcompile.ir.model import Model
from mpcompile.pipeline.partial_results import run_key

SAMPLED_IMAGES = 64  # images whose pixels identify the training set, beside its size and order


def training_key(options: str, model: Model, images: Split) -> str:
    """The key of a training with these options, model, dense model, masks and training images."""
    digest = hashlib.sha256(options.encode())
    digest.update(repr((model.source, images.labelled, images.order, model.head)).encode())
    for node in model.graph.graph.nodes:
        digest.update(f"{node.op} {node.name} {node.target if node.op != 'call_function' else ''} ".encode())
        digest.update(f"{node.args} {node.kwargs}".encode())
    assert model.dense is not None
    for name, value in [*model.dense.state_dict().items(), *model.masks().items()]:
        digest.update(name.encode() + value.detach().contiguous().numpy(force=True).tobytes())
    # All labels if they are known without decoding images; else those of the first images.
    labels = getattr(images.images, "labels", None)
    some = replace(images, order=images.order[:SAMPLED_IMAGES])
    known = [label for _, batch in some.batches() for label in batch.tolist()] if labels is None else list(labels)
    digest.update(repr([np.asarray(label).tolist() for label in known]).encode())
    return run_key(digest.hexdigest(), model, {}, some)
