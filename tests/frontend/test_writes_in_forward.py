"""Forward functions that write into tensors: the graph writes the same, and values that were written are known."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mpcompile.errors import CaptureError
from mpcompile.frontend.capture import capture, noise
from mpcompile.testing import tiny_source

Change = Callable[[Tensor], Tensor]


class Changes(nn.Module):
    """A linear layer on images that a function has changed."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        self.head = nn.Linear(64, 4)
        self.register_buffer("table", torch.rand(64))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.change(x.flatten(1)))  # type: ignore[no-any-return]


def through_a_view_of_the_input(x: Tensor) -> Tensor:
    x[:, :32].add_(1)
    return x


def through_a_view_of_a_constant(x: Tensor) -> Tensor:
    table = torch.zeros(64)
    table[:32].copy_(x.mean(0)[32:])
    return x + table


def by_an_operator(x: Tensor) -> Tensor:
    positive = x > 0
    left = positive[:, :32]
    left |= True
    every = torch.ones(64, dtype=torch.bool)
    every &= (x > 1).any(0)
    return x * positive + every


def into_a_copy(x: Tensor) -> Tensor:
    changed = copy.deepcopy(x)
    changed[:, 0] = 1
    return changed + x


@torch.inference_mode()
def with_constants_of_inference_mode(x: Tensor) -> Tensor:
    return x + torch.ones(64)


@pytest.mark.parametrize(
    "change",
    [
        through_a_view_of_the_input,
        through_a_view_of_a_constant,
        by_an_operator,
        into_a_copy,
        with_constants_of_inference_mode,
    ],
)
def test_the_graph_writes_as_forward_does(change: Change) -> None:
    module = Changes(change).eval()
    model = capture(module, tiny_source())
    images = noise((1, 8, 8), batch=5, seed=3)
    given = images.clone()
    assert model.captured_by == "recorder"
    with torch.no_grad():
        assert torch.equal(model(given), module(images.clone()))
    assert torch.equal(given, images)  # the next model is measured on the same images


def read_behind_a_view_of_zeros(x: Tensor) -> Tensor:
    sums = torch.zeros_like(x)
    sums[:, 0].add_(x.sum(1))
    return -x if sums.sum() > 1000 else x


def read_behind_an_item(x: Tensor) -> Tensor:
    sums = torch.zeros_like(x)
    sums[0][1] = x.sum()
    return -x if sums.sum() > 1000 else x


def read_in_an_older_view(x: Tensor) -> Tensor:
    sums = torch.zeros(64)
    first = sums[:3]
    sums[0] = x.sum()
    return -x if first.sum() > 1000 else x


def read_where_it_was_filled(x: Tensor) -> Tensor:
    filled = torch.full_like(x, fill_value=x.sum())  # type: ignore[arg-type]
    return -x if filled[0, 0] > 1000 else x


@pytest.mark.parametrize(
    "change",
    [read_behind_a_view_of_zeros, read_behind_an_item, read_in_an_older_view, read_where_it_was_filled],
)
def test_a_branch_on_written_values_is_refused(change: Change) -> None:
    with pytest.raises(CaptureError, match=r"reads a value that depends on the image \(bool\).*> 1000"):
        capture(Changes(change), tiny_source())


class WritesState(Changes):
    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("table")[:3].copy_(x.flatten(1)[0, :3])
        return super().forward(x)


def test_writes_into_images_are_found_in_inference_mode() -> None:
    module = Changes(through_a_view_of_the_input).eval()
    with torch.inference_mode():
        model = capture(module, tiny_source())
        images = noise((1, 8, 8), batch=5, seed=3)
        given = images.clone()
        assert torch.equal(model(given), module(images.clone()))
    assert torch.equal(given, images)


def test_a_view_of_a_buffer_is_state_too() -> None:
    with pytest.raises(CaptureError, match="forward writes into its own table"):
        capture(WritesState(lambda x: x), tiny_source())


def test_a_branch_between_one_image_and_more_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"outputs on a batch of 1 differ.*branches on the batch size"):
        capture(Changes(lambda x: x * 2 if len(x) > 1 else x), tiny_source())
