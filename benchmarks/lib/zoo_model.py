"""One architecture of the list in zoo.py: how it is built, its inputs, and random weights whose outputs differ.

Weights as the constructors leave them are of no use here: many give nearly the same outputs for all images (a last
layer of zeros, layer scales of 1e-6), and a graph that lost a branch would pass every comparison.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SMALLEST_VARIANCE = 1e-4


@dataclass(frozen=True, slots=True)
class ZooModel:
    """A model of random weights.

    Attributes:
        build: makes the module.
        size: of one image, without the batch axis; (channels, height, width), with frames in front for a video.
        inputs: makes all inputs of a batch by name, the image first; None if the image is the only input.
    """

    build: Callable[[], nn.Module]
    size: tuple[int, ...] = (3, 64, 64)
    inputs: Callable[[int, torch.Generator], dict[str, Tensor]] | None = None

    def batch(self, count: int, seed: int) -> Tensor | dict[str, Tensor]:
        """A batch of inputs, determined by the seed: a tensor if the image is the only one, else a dict by name."""
        generator = torch.Generator().manual_seed(seed)
        if self.inputs is not None:
            return self.inputs(count, generator)
        return torch.randn(count, *self.size, generator=generator)

    def lively(self) -> nn.Module:
        """The module in evaluation mode, with random weights whose outputs differ between images."""
        torch.manual_seed(0)
        module = self.build().eval()
        _randomize(module)
        _settle_batch_norms(module, self.batch(8, seed=2))
        return module


@torch.no_grad()
def _randomize(module: nn.Module) -> None:
    """Weights that keep the size of activations, biases, scales around 1, and batch statistics around 0 and 1."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        if parameter.ndim >= 2:
            token = any(word in name for word in ("embed", "token", "query"))
            deviation = 0.5 if token else max(parameter[0].numel(), 1) ** -0.5
            parameter.normal_(0, deviation, generator=generator)
        elif name.endswith("bias"):
            parameter.normal_(0, 0.1, generator=generator)
        else:
            parameter.uniform_(0.5, 1.5, generator=generator)
    for name, buffer in module.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith("running_mean"):
            buffer.normal_(0, 0.1, generator=generator)


@torch.no_grad()
def _settle_batch_norms(module: nn.Module, inputs: Tensor | dict[str, Tensor]) -> None:
    """Sets the statistics of batch normalization to those of a batch, as training would have."""
    norms = [
        m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_var is not None
    ]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    call(module, inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval()
        norm.momentum = momentum
        if norm.running_var is not None:
            norm.running_var.clamp_(min=SMALLEST_VARIANCE)


@torch.no_grad()
def call(module: nn.Module, inputs: Tensor | dict[str, Tensor]) -> object:
    """The module's outputs, in the module's own structure."""
    return module(**inputs) if isinstance(inputs, dict) else module(inputs)
