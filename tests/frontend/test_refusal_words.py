"""What a refused capture says, and that it prints nothing beside."""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpcompile.errors import CaptureError
from mpcompile.frontend.call_inputs import require_kinds
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


@pytest.mark.parametrize(
    ("module", "example", "inputs", "text"),
    [
        (Head, None, {}, "the model is the class Head; give an nn.Module"),
        (lambda x: x, None, {}, "the model is a function; give an nn.Module"),
        (Head(by_a_value), None, {"scale": 3.0}, "the input scale is a float; give a tensor"),
        (Head(by_a_value), [1], {}, r"the input example\[0\] is a list; give a tensor"),
        (Head(by_a_value), {}, {}, "the example has no inputs"),
    ],
)
def test_arguments_of_other_kinds_are_named(module: Any, example: Any, inputs: Any, text: str) -> None:
    with pytest.raises(CaptureError, match=text):
        require_kinds(module, example, inputs)


def refused(_: int) -> bool:
    with pytest.raises(CaptureError):
        capture(Head(by_a_value), tiny_source())
    return True


def test_the_stream_of_errors_is_as_it_was_after_captures_in_threads() -> None:
    before = sys.stderr
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(refused, range(8)))
    assert sys.stderr is before
