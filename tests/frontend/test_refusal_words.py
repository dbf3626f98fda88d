"""What a refused capture says, and that it prints nothing beside."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mpcompile.errors import CaptureError
from mpcompile.frontend.capture import capture
from mpcompile.testing import tiny_source


class Head(nn.Module):
    """A function of a linear layer and images."""

    def __init__(self, run: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.head = nn.Linear(64, 4)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.head, x.flatten(1))


def under_autocast(head: nn.Linear, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y: Tensor = head(x)
    return y.float()


def by_a_value(head: nn.Linear, x: Tensor) -> Tensor:
    return head(-x if float(x[0, 0]) > 0 else x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("run", "text"),
    [
        (lambda head, x: torch.stack([head(row) for row in x]), "does not run on a batch of 1: .*loops over images"),
        (
            lambda head, x: torch.vmap(head)(x),
            r"returns \(2, 4\) for a batch of 1, and the module \(1, 4\).*torch\.vmap",
        ),
        (lambda head, x: head(x) * x.shape[0] ** 0.5, r"differ by .*floating point"),
        (lambda head, x: head(x.reshape(2, -1)), "does not run on a batch of"),
        (under_autocast, r"differ by .*torch\.autocast"),
        (by_a_value, r"reads a value that depends on the image \(float\)"),
    ],
)
def test_a_refusal_names_the_cause_and_prints_nothing(
    run: Callable[[nn.Linear, Tensor], Tensor], text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CaptureError, match=text):
        capture(Head(run), tiny_source())
    assert capfd.readouterr() == ("", "")
