"""Layers of other kinds than Linear and Conv2d count as layers before and after a layer."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpcompile.analysis.eligibility import eligible
from mpcompile.frontend.capture import capture
from mpcompile.ir.pattern import TWO_OF_FOUR
from mpcompile.testing import tiny_source


class BehindConv1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(8, 16, 3, padding=1)
        self.hidden = nn.Linear(8, 8)
        self.last = nn.Conv1d(16, 4, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.hidden(self.stem(x.flatten(1, 2)))).flatten(1)
        return out


def test_a_linear_between_two_conv1d_is_neither_stem_nor_output_layer() -> None:
    reasons = eligible(capture(BehindConv1d(), tiny_source()), TWO_OF_FOUR)
    assert reasons["hidden"] is None
    assert reasons["stem"] == "stem: it reads the image itself"
    assert str(reasons["last"]).startswith("output layer")


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.rows(x.flatten(1, 2))[0].mean(1))
        return out


def test_the_layer_behind_a_gru_is_the_output_layer_and_no_stem() -> None:
    reasons = eligible(capture(Recurrent(), tiny_source()), TWO_OF_FOUR)
    assert str(reasons["head"]).startswith("output layer")


class Products(nn.Module):
    """A product with a parameter, or a module with a weight of its own, reads the image; another gives the outputs."""

    def __init__(self, stem: nn.Module | None) -> None:
        super().__init__()
        self.stem, self.hidden = stem, nn.Linear(8, 8)
        self.basis, self.out = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1, 2).mean(1)
        x = torch.einsum("bi,ij->bj", x, self.basis * 2) if self.stem is None else self.stem(x)
        return self.hidden(x) @ self.out  # type: ignore[no-any-return]


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


@pytest.mark.parametrize(("stem", "leaves"), [(None, ()), (nn.RNNCell(8, 8), ()), (Own(), ("stem",))])
def test_weights_of_any_kind_count_as_layers_before_and_after(stem: nn.Module | None, leaves: tuple[str, ...]) -> None:
    assert eligible(capture(Products(stem), tiny_source(), leaves=leaves), TWO_OF_FOUR)["hidden"] is None


def test_a_fixed_matrix_before_the_stem_is_no_layer() -> None:
    class Fixed(Products):
        def __init__(self) -> None:
            super().__init__(None)
            del self.basis
            self.register_buffer("basis", torch.randn(8, 8))

    assert str(eligible(capture(Fixed(), tiny_source()), TWO_OF_FOUR)["hidden"]).startswith("stem")


def test_a_conv1d_whose_weight_is_read_is_listed() -> None:
    class Read(BehindConv1d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv1d(self.hidden(self.stem(x.flatten(1, 2))), self.last.weight * 2).flatten(1)

    reasons = eligible(capture(Read(), tiny_source()), TWO_OF_FOUR)
    assert str(reasons["last"]).startswith("Conv1d: it is not run as a Conv2d")
    assert reasons["hidden"] is None


def test_other_convolutions_are_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.up = nn.Conv2d(1, 4, 3), nn.ConvTranspose2d(4, 4, 2)
            self.deep, self.head = nn.Conv3d(1, 1, (4, 1, 1)), nn.Conv2d(1, 2, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.deep(self.up(self.stem(x))[:, None])[:, 0]).flatten(1)  # type: ignore[no-any-return]

    reasons = eligible(capture(Net(), tiny_source()), TWO_OF_FOUR)
    assert str(reasons["up"]).startswith("ConvTranspose2d: a transposed convolution")
    assert reasons["deep"] == "Conv3d: only Linear, Conv1d and Conv2d can be masked"
