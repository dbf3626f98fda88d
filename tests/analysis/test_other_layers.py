"""Layers of other kinds than Linear and Conv2d count as layers before and after a layer."""

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
    assert reasons["stem"] == "Conv1d: only Linear and Conv2d can be masked"


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
