"""The inputs that a graph takes and the outputs that it returns.

A graph takes the images first and then its other inputs. It returns the primary output, or a tuple that begins with it.
The primary output is the one that agreement, certificates and distillation compare.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Tensors = Tensor | tuple[Tensor, ...]  # one tensor, or several in the order of the graph


def arguments(inputs: Tensors, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """The inputs of a graph, in order; floating-point ones converted to `dtype` if it is given."""
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    return tuple(one.to(dtype) if dtype is not None and one.is_floating_point() else one for one in given)


def stacked(rows: Sequence[Tensors]) -> tuple[Tensor, ...]:
    """The inputs of a batch from those of each image, which have no batch axis."""
    return tuple(torch.stack(parts) for parts in zip(*map(arguments, rows), strict=True))


def all_outputs(outputs: Tensors) -> tuple[Tensor, ...]:
    """All outputs of a graph, the primary one first."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def primary(outputs: Tensors) -> Tensor:
    """The primary output of a graph, (b, …)."""
    return outputs[0] if isinstance(outputs, tuple) else outputs
