"""Runs a model on its example and records every node's shape."""

import torch
from torch import Tensor
from torch.fx.passes.shape_prop import ShapeProp

from mpcompile.ir.model import Model


def run_example(model: Model) -> Tensor:
    """The outputs (b, …) on the example. Records each node's shape and dtype in `node.meta["tensor_meta"]`."""
    with torch.no_grad():
        outputs: Tensor = ShapeProp(model.graph).propagate(model.example)
    return outputs
