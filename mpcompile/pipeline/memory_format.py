"""The memory format of the images that passes run a model on."""

import torch
from torch import Tensor, nn

from mpcompile.ir.batch import all_outputs
from mpcompile.ir.model import Model
from mpcompile.ir.parity import TOLERANCE, relative_difference
from mpcompile.system.device import CPU


def memory_format_for(model: Model) -> torch.memory_format:
    """`channels_last` if the model has several convolutions, on a CPU, and computes the same on such images.

    torch takes half the time for EfficientNet-Lite0 on them, and 0.7 of it for ResNet-50 (AMD EPYC, one thread). Code
    that views channels and positions as one axis, `x.view(len(x), -1)`, does not run on them.
    """
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.graph.modules())
    if model.example.device != CPU or model.example.ndim != 4 or convolutions < 2:
        return torch.contiguous_format
    try:
        expected, found = (_outputs(model, kind) for kind in (torch.contiguous_format, torch.channels_last))
    except RuntimeError:  # "view size is not compatible with input tensor's size and stride"
        return torch.contiguous_format
    same = all(
        relative_difference(one.double().numpy(), other.double().numpy()) < TOLERANCE["fp32"]
        for one, other in zip(expected, found, strict=True)
    )
    return torch.channels_last if same else torch.contiguous_format


@torch.no_grad()
def _outputs(model: Model, kind: torch.memory_format) -> tuple[Tensor, ...]:
    """The outputs on the example, whose images are in this format."""
    images, *others = (one.clone() for one in model.example_inputs)
    return all_outputs(model.graph(images.contiguous(memory_format=kind), *others))
