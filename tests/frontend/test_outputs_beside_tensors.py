"""Outputs of unusual kinds: containers with constructors of their own, values that are no tensors, empty tensors."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpcompile.errors import CaptureError
from mpcompile.frontend.capture import capture, noise
from mpcompile.ir.output_tree import flattened
from mpcompile.testing import tiny_source


@dataclass
class Scores:
    logits: Tensor
    seen: list[Tensor] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.seen = [self.logits * 2]


class Returns(nn.Module):
    """Returns what a function makes of the logits and the images."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.head = nn.Linear(64, 4)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.head(x.flatten(1)), x)


@pytest.mark.parametrize(
    "form",
    [
        lambda logits, _: Scores(logits),
        lambda logits, x: defaultdict(list, logits=logits, rest=x),
        lambda logits, x: {"logits": logits, "boxes": x[:, :0]},
    ],
)
def test_structures_come_back(form: Callable[[Tensor, Tensor], Any]) -> None:
    module = Returns(form).eval()
    model = capture(module, tiny_source())
    images = noise((1, 8, 8), batch=5, seed=3)
    with torch.no_grad():
        wanted, found = module(images), model.as_returned(images)
    assert type(found) is type(wanted)
    pairs = zip(flattened(wanted)[1], flattened(found)[1], strict=True)
    assert all(name == other and torch.equal(one, two) for (name, one), (other, two) in pairs)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (lambda logits, x: {"logits": logits, "count": x.shape[0]}, "returns 2 beside its tensors for 2 images and 3"),
        (lambda logits, x: (logits, x.shape[0] / 2), r"returns 1\.0 beside its tensors for 2 images and 1\.5 for 3"),
        (lambda _, x: x[:, :0], r"returns a tensor of shape \(2, 0, 8, 8\)"),
    ],
)
def test_what_a_graph_cannot_return_is_refused(form: Callable[[Tensor, Tensor], Any], text: str) -> None:
    with pytest.raises(CaptureError, match=text):
        capture(Returns(form), tiny_source())
