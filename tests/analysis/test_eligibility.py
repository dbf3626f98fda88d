"""eligible_patterns: the pattern of each layer, or the reason why it stays dense."""

import pytest
import torch
from torch import Tensor, nn

from mpcompile.analysis.eligibility import eligible, eligible_patterns, graph_positions, tied_layers
from mpcompile.errors import UsageError
from mpcompile.frontend.capture import capture
from mpcompile.ir.model import LayerPlan
from mpcompile.ir.pattern import NM, TWO_OF_FOUR
from mpcompile.testing import tiny_cnn, tiny_mlp, tiny_vit


def test_layers_without_a_plan_get_the_given_pattern_or_two_of_four() -> None:
    model = tiny_vit()
    for given, expected in ((NM(1, 4), NM(1, 4)), (None, TWO_OF_FOUR)):
        patterns = eligible_patterns(model, given)
        reasons = eligible(model, expected)
        assert patterns == {name: reason or expected for name, reason in reasons.items()}


def test_after_a_budget_layers_without_a_planned_pattern_stay_dense() -> None:
    model = tiny_vit().with_plan({"blocks.0.mlp.fc1": LayerPlan(pattern=NM(1, 4))})
    patterns = eligible_patterns(model, None)
    assert patterns["blocks.0.mlp.fc1"] == NM(1, 4)
    assert patterns["blocks.0.mlp.fc2"] == "no pattern was planned for it"
    assert eligible_patterns(model, TWO_OF_FOUR)["blocks.0.mlp.fc2"] == TWO_OF_FOUR


def test_include_and_exclude() -> None:
    patterns = eligible_patterns(tiny_cnn(), TWO_OF_FOUR, include=("head", "widen"), exclude=("body",))
    assert patterns["head"] == TWO_OF_FOUR  # dense by default
    assert patterns["widen"] == "6 input channels are not a multiple of 4"  # a fact
    assert patterns["body"] == "excluded by 'body'"
    with pytest.raises(UsageError, match="no layer name matches 'boddy'; the layers are stem"):
        eligible_patterns(tiny_cnn(), TWO_OF_FOUR, exclude=("boddy",))


def test_positions_and_tied_layers_of_an_mlp() -> None:
    model = tiny_mlp()
    positions = graph_positions(model)
    first, *_, last = (name for name, _ in model.layers())
    assert not positions[first].layers_before
    assert not positions[last].layers_after
    assert tied_layers(model, list(positions)) == [(name,) for name in positions]


class Standardized(nn.Conv2d):
    """A convolution that normalizes its weight before each use."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight / self.weight.std((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(input, weight, padding=1)


class BetweenStandardized(nn.Module):
    """A convolution with such a one before it and another behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Standardized(3, 8, 3, bias=False)
        self.middle = nn.Conv2d(8, 8, 3)
        self.last = Standardized(8, 8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        last: Tensor = self.last(self.middle(self.first(x).relu()).relu()).mean((2, 3))
        return last


def test_a_convolution_of_a_computed_weight_counts_as_a_layer_before_and_behind() -> None:
    reasons = eligible(capture(BetweenStandardized(), example=torch.randn(2, 3, 8, 8)), NM(2, 4))
    assert reasons["middle"] is None  # neither a stem nor the output layer
    assert "Standardized may rewrite its weight" in str(reasons["first"])
