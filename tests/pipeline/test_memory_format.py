"""Passes run models with convolutions on channels-last images, unless these do not run on them or compute otherwise."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from mpcompile.data.images import Data
from mpcompile.frontend.capture import capture
from mpcompile.ir.model import Model
from mpcompile.pipeline.memory_format import memory_format_for
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.pipeline.pass_record import Effect
from mpcompile.testing import tiny_data, tiny_source, tiny_vit

COLOUR = tiny_source((3, 8, 8))


class Convolutions(nn.Module):
    """Two convolutions and a head, which reads the mean of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def pooled(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pooled(self.body(self.stem(x))))  # type: ignore[no-any-return]


class Viewed(Convolutions):
    """Views channels and positions as one axis, which channels-last values do not allow."""

    def pooled(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1)[:, :8]


class InMemoryOrder(nn.Conv2d):
    """Takes its results in the order of memory, so that the format changes them."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y.as_strided(y.shape, (y[0].numel(), y[0, 0].numel(), y.shape[3], 1))


@pytest.mark.parametrize(("module", "wanted"), [(Convolutions, torch.channels_last), (Viewed, torch.contiguous_format)])
def test_only_a_model_that_runs_on_channels_last_images_gets_them(
    module: type[nn.Module], wanted: torch.memory_format
) -> None:
    assert memory_format_for(capture(module().eval(), COLOUR)) == wanted


def test_a_model_that_computes_otherwise_keeps_contiguous_images() -> None:
    model = capture(Convolutions().eval(), COLOUR)
    model.graph.body = InMemoryOrder(8, 8, 3)
    assert memory_format_for(model) == torch.contiguous_format


def test_a_model_with_one_convolution_keeps_contiguous_images() -> None:
    assert memory_format_for(tiny_vit()) == torch.contiguous_format


@dataclass(frozen=True)
class Look:
    """Keeps what it sees of the calibration images."""

    name: ClassVar[str] = "look"
    effect: ClassVar[Effect] = Effect.ANALYSIS
    requires: ClassVar[tuple[str, ...]] = ()
    seen: list[Tensor]

    def __call__(self, model: Model, data: Data) -> Model:
        self.seen.append(data.calibration.first(4))
        return model


def test_the_images_of_a_pass_have_this_format_and_the_same_values() -> None:
    model = capture(Convolutions().eval(), COLOUR)
    data, look = tiny_data(model), Look([])
    PassManager([look]).run(model, data)
    [images] = look.seen
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert not images.is_contiguous()
    assert torch.equal(images, data.calibration.first(4))
