"""Heads: decisions by the largest output or by thresholds, margins that prove a decision, and the text of a choice."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from mpcompile.ir.head import KINDS, Head, HeadChoice, head_for
from mpcompile.passes.certify import certificate, unchanged

OUTPUTS = npst.arrays(np.float32, (6, 3), elements=st.floats(-4, 4, width=32))


def test_decisions_by_hand() -> None:
    outputs = torch.tensor([[0.2, 0.7, 0.6], [-1.0, -2.0, -3.0]])
    assert Head().decisions(outputs).tolist() == [1, 0]
    assert Head("sigmoid").decisions(outputs[:, :1]).tolist() == [1, 0]
    assert Head("sigmoid", 0.5, True).decisions(outputs[:, :1]).tolist() == [0, 0]
    assert Head("multilabel", 0.5).decisions(outputs).tolist() == [[0, 1, 1], [0, 0, 0]]
    assert Head("ordinal", 0.5).decisions(outputs.numpy()).tolist() == [2, 0]
    assert Head("multilabel", 0.5).right(outputs, torch.tensor([[0, 1, 1], [0, 0, 1]])).tolist() == [True, False]
    assert [Head(kind).classes(4) for kind in KINDS] == [4, 2, 4, 5, 0]  # type: ignore[arg-type]


@given(
    st.sampled_from([kind for kind in KINDS if kind != "values"]), OUTPUTS, OUTPUTS, st.floats(0, 1), st.floats(-1, 1)
)
def test_no_proven_decision_differs(
    kind: str, one: np.ndarray, change: np.ndarray, by: float, threshold: float
) -> None:
    head = Head(kind, threshold)  # type: ignore[arg-type]
    outputs = torch.from_numpy(one[:, :1] if kind == "sigmoid" else one)
    others = outputs + by * torch.from_numpy(change)[:, : outputs.shape[1]]
    proven = unchanged(outputs, others, head)
    assert bool(head.same(outputs, others)[proven].all())
    found = certificate(outputs, others, 0.95, head)
    assert found.proven == int(proven.sum()) <= found.agreeing
    assert found.head == kind


def test_a_threshold_proves_where_a_softmax_margin_would_not_exist() -> None:
    before, after = torch.tensor([[0.3], [-2.0], [0.1]]), torch.tensor([[0.2], [-1.0], [-0.1]])
    found = certificate(before, after, 0.95)
    assert (found.head, found.agreeing, found.proven) == ("sigmoid", 2, 2)
    assert found.margin_median == pytest.approx(0.3)


def test_choices_resolve_by_the_number_of_outputs() -> None:
    assert HeadChoice.parse("auto").resolved(10, False) == Head()
    assert HeadChoice.parse("auto").resolved(1, True) == Head("sigmoid", 0.5, True)
    found = HeadChoice.parse("sigmoid:0.3").resolved(1, False)
    assert found.threshold == pytest.approx(math.log(0.3 / 0.7))
    assert HeadChoice.parse("multilabel:0.3").resolved(4, True).threshold == 0.3
    assert head_for(None, torch.zeros(2, 1)) == Head("sigmoid")
    assert head_for(None, torch.zeros(2, 3, 4)) == HeadChoice.parse("values").resolved(3, False) == Head("values")
    with pytest.raises(ValueError, match="have no decision"):
        Head("values").decisions(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="the head sigmoid needs one output, and the model has 3"):
        HeadChoice.parse("sigmoid").resolved(3, False)
    with pytest.raises(ValueError, match="the head softmax needs 2 or more outputs, and the model has 1"):
        HeadChoice.parse("softmax").resolved(1, False)


@pytest.mark.parametrize(
    "text", ["logits", "sigmoid:", "sigmoid:2", "sigmoid:x", "softmax:0.5", "auto:0.5", "values:0.5", ""]
)
def test_unknown_choices_are_refused_in_words(text: str) -> None:
    with pytest.raises(
        ValueError, match="give auto, softmax, sigmoid, multilabel, ordinal, values, or one with a threshold"
    ):
        HeadChoice.parse(text)
