"""Tiny models with each kind of head, and a compressed form of them that has lost confidence."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import no_type_check

import torch
from torch import Tensor, nn

from mpcompile.data.images import Data
from mpcompile.frontend.capture import capture
from mpcompile.ir.head import Head
from mpcompile.ir.model import Model
from mpcompile.testing import tiny_data, tiny_source

CLASSES = 5
Finish = Callable[["Headed", Tensor], Tensor | tuple[Tensor, ...]]


class Headed(nn.Module):
    """A convolution, and the layers from which `finish` makes the outputs."""

    def __init__(self, finish: Finish, outputs: int = CLASSES, bias: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.one = nn.Linear(8, outputs, bias=bias)
        self.other = nn.Linear(8, outputs)
        self.maps = nn.Conv2d(8, outputs, 1)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self._finish = finish

    @no_type_check  # it is run with proxies, which beartype's checks of annotations reject
    def forward(self, x):
        return self._finish(self, self.stem(x).relu())


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def faded(
    finish: Finish, head: Head | None = None, outputs: int = CLASSES, bias: bool = True, keep: float = 0.4
) -> tuple[Model, Data]:
    """A model whose logits are `keep` times the dense ones, with a small error, and images for it."""
    torch.manual_seed(0)
    module = Headed(finish, outputs, bias).eval()
    with torch.no_grad():
        for layer in (module.one, module.other, module.maps):
            layer.weight.mul_(12)
    model = replace(capture(module, tiny_source()), head=head)
    dense = copy.deepcopy(model.graph)
    pivot = head.threshold if head is not None and head.kind != "softmax" and not head.probabilities else 0.0
    with torch.no_grad():
        for name, layer in model.layers():
            if name != "stem":
                layer.weight.add_(0.02 * torch.randn_like(layer.weight)).mul_(keep)
                if layer.bias is not None:
                    layer.bias.mul_(keep).add_((1 - keep) * pivot)
    return replace(model, dense=dense), tiny_data(model)
