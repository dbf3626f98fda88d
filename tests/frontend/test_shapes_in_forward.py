"""Forward functions whose Python code depends on the shape of the image, and models that are not repeatable."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpcompile.analysis.eligibility import eligible
from mpcompile.errors import CaptureError
from mpcompile.frontend.capture import capture, noise
from mpcompile.ir.pattern import TWO_OF_FOUR
from mpcompile.testing import tiny_source


class PadsToAMultiple(nn.Module):
    """Pads to a multiple of 8 by shape, as detection backbones do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(1, 8, 3, 2), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if height % 8 or width % 8:
            x = F.pad(x, (0, (8 - width % 8) % 8, 0, (8 - height % 8) % 8))
        return self.head(self.body(self.stem(x)).mean((2, 3)))  # type: ignore[no-any-return]


class CutsATable(nn.Module):
    """Buffers cut to the number of tokens: one of positions as integers, one of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(1, 8, 2, 2), nn.Linear(8, 8), nn.Linear(8, 4)
        self.table = nn.Parameter(torch.randn(32, 8))
        self.register_buffer("index", torch.arange(64) % 32)
        self.register_buffer("scale", torch.rand(64, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        index, scale = self.get_buffer("index"), self.get_buffer("scale")
        x = (x + self.table[index[: x.shape[1]]]) * scale[: x.size(1)]
        return self.head((x + self.body(x)).mean(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [PadsToAMultiple, CutsATable])
@pytest.mark.parametrize("side", [8, 11])
def test_a_shape_may_decide(kind: type[nn.Module], side: int) -> None:
    module = kind().eval()
    model = capture(module, tiny_source((1, side, side)))
    assert {name for name, reason in eligible(model, TWO_OF_FOUR).items() if reason is None} == {"body"}
    images = noise((1, side, side), batch=5, seed=3)
    assert torch.equal(model(images), module(images))


class FaintNoise(CutsATable):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 1e-7 * torch.randn_like(x))


class Remembers(CutsATable):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x) * self.calls


@pytest.mark.parametrize("kind", [FaintNoise, Remembers])
def test_a_model_that_is_not_repeatable_is_named_before_any_pass(kind: type[nn.Module]) -> None:
    with pytest.raises(CaptureError, match=f"{kind.__name__} gives other outputs when the same images are run again"):
        capture(kind(), tiny_source())
