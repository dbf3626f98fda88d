"""Runs a model on its example and records every node's shape."""

import torch
from torch import Tensor
from torch.fx.passes.shape_prop import ShapeProp

from mpcompile.ir.batch import all_outputs
from mpcompile.ir.model import Model


def run_example(model: Model) -> tuple[Tensor, ...]:
    """All outputs on the example, the primary one first. Records each node's shape in `node.meta["tensor_meta"]`."""
    with torch.no_grad():
        return all_outputs(ShapeProp(model.graph).propagate(*(one.clone() for one in model.example_inputs)))
