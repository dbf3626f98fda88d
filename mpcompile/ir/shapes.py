"""The shape of a model's outputs, by running it on its example."""

import torch
from torch import Tensor
from torch.fx.passes.shape_prop import ShapeProp

from mpcompile.ir.model import Model


def run_example(model: Model) -> Tensor:
    """The outputs on the example; every node's shape is recorded in its `tensor_meta` on the way."""
    with torch.no_grad():
        outputs: Tensor = ShapeProp(model.graph).propagate(model.example)
    return outputs
