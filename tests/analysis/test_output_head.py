"""Whether outputs are logits or probabilities is read from the graph, or from values where the graph does not say."""

import pytest
import torch
from torch import nn

from mpcompile.analysis.output_head import gives_probabilities, with_head
from mpcompile.errors import UsageError
from mpcompile.frontend.capture import capture
from mpcompile.ir.head import Head
from mpcompile.ir.model import Model
from mpcompile.testing import TinyMLP, tiny_source


class Ended(nn.Module):
    """A small model with a function behind its outputs."""

    def __init__(self, end: object, outputs: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.end = TinyMLP(outputs=outputs), end

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.end(self.net(x))  # type: ignore[operator, no-any-return]


def ended(end: object, outputs: int = 1) -> Model:
    return capture(Ended(end, outputs), tiny_source())


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (torch.sigmoid, True),
        (nn.Sigmoid(), True),
        (lambda x: x.sigmoid().flatten(1), True),
        (lambda x: nn.functional.softmax(torch.cat([x, -x], 1), dim=1)[:, 1:], True),
        (nn.Identity(), False),
        (lambda x: x + 1, False),
        (lambda x: 1 - torch.sigmoid(x), None),
        (lambda x: x.clamp(0, 1), None),
    ],
)
def test_the_last_operation_tells(end: object, expected: bool | None) -> None:
    assert gives_probabilities(ended(end).graph) is expected


def test_one_output_is_decided_by_a_threshold() -> None:
    model, [note] = with_head(ended(torch.sigmoid), "auto", None)
    assert model.head == Head("sigmoid", 0.5, True)
    assert "exceeds 0.5" in note
    model, [note] = with_head(ended(nn.Identity()), "auto", None)
    assert model.head == Head("sigmoid", 0.0)
    assert "a logit" in note
    model, [note] = with_head(ended(lambda x: 1 - torch.sigmoid(x)), "auto", None)
    assert model.head == Head("sigmoid", 0.5, True)
    assert "as all outputs on the examined images lie between 0 and 1" in note


def test_probabilities_in_place_of_logits_are_noticed() -> None:
    model, [note] = with_head(ended(nn.Softmax(1), 5), "auto", None)
    assert model.head == Head(probabilities=True)
    assert "the outputs are probabilities, not logits" in note
    _, [note] = with_head(ended(torch.sigmoid, 5), "auto", None)
    assert "give --head multilabel" in note
    model, [note] = with_head(ended(torch.sigmoid, 5), "multilabel", None)
    assert model.head == Head("multilabel", 0.5, True)
    assert with_head(ended(nn.Identity(), 5), "auto", None)[1] == ()


def test_outputs_that_do_not_depend_on_the_image_are_noticed() -> None:
    for end in (lambda x: x * 0, lambda x: x * 0 + 3):
        _, notes = with_head(ended(end, 4), "auto", (torch.rand(8, 1, 8, 8),))
        assert "returns the same outputs for each of 8 calibration images" in notes[-1]


def test_a_head_that_does_not_fit_the_outputs_is_refused() -> None:
    with pytest.raises(UsageError, match="the head softmax needs 2 or more outputs"):
        with_head(ended(nn.Identity()), "softmax", None)


@pytest.mark.parametrize(("choice", "kind"), [("multilabel", "multilabel"), ("ordinal", "ordinal")])
def test_probabilities_of_several_outputs_are_known_by_their_values(choice: str, kind: str) -> None:
    """1 − sigmoid is not known to be a probability, and each output was decided at 0: always above."""
    model, [note] = with_head(ended(lambda x: 1 - torch.sigmoid(x), 3), choice, None)
    assert model.head == Head(kind, 0.5, True)  # type: ignore[arg-type]
    assert "as all outputs on the examined images lie between 0 and 1" in note
    assert with_head(ended(lambda x: x * 2.0, 3), choice, None)[0].head == Head(kind, 0.0)  # type: ignore[arg-type]
