"""capture of modules whose forward calls cached functions of a size."""

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpcompile.frontend.cached_functions import cached_functions
from mpcompile.frontend.capture import capture


def cached(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A decorator that keeps its cache in a closure, as transformers' does."""
    kept = functools.lru_cache(maxsize=4)(function)

    @functools.wraps(function)
    def call(*args: Any) -> Tensor:
        return kept(*args)

    return call


@functools.lru_cache
def positions(shape: torch.Size) -> Tensor:
    return torch.arange(shape[-1], dtype=torch.float32).expand(shape[0], 3, shape[-2], shape[-1])


class Embedded(nn.Module):
    """Adds positions of the batch's own shape."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x + self.positions(x.shape)).mean((2, 3))
        return out

    def positions(self, shape: torch.Size) -> Tensor:
        return positions(shape)


class Static(Embedded):
    @staticmethod
    @cached
    def positions(shape: torch.Size) -> Tensor:
        return positions.__wrapped__(shape)


class OfAnInstance(Embedded):
    @cached
    def positions(self, shape: torch.Size) -> Tensor:
        return positions.__wrapped__(shape)


@pytest.mark.parametrize("kind", [Embedded, Static, OfAnInstance])
def test_a_tensor_of_an_earlier_run_is_computed_anew(kind: type[Embedded]) -> None:
    module, example = kind(), torch.randn(2, 3, 8, 8)
    module(example)
    capture(module, example=example)
    model = capture(module, example=example)
    other = torch.randn(5, 3, 8, 8)
    assert torch.equal(model(other), module(other))
    assert len(list(cached_functions(module))) == (1 if kind is Embedded else 2)  # `positions` is in this file


def test_caches_hold_nothing_of_a_recording() -> None:
    graph = weakref.ref(capture(Static(), example=torch.randn(2, 3, 8, 8)).graph.graph)
    gc.collect()
    assert graph() is None
