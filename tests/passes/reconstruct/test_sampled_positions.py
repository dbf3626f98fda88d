"""Sampled positions: one of each run of positions, the same for the same key, and the rows that `columns` has there."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mpcompile.ir.model import Model
from mpcompile.passes.reconstruct.layer_rows import columns, columns_at, product
from mpcompile.passes.reconstruct.layerwise import layerwise
from mpcompile.passes.reconstruct.sampled_positions import positions_per_image, sampled_positions
from mpcompile.passes.reconstruct.second_moments import SecondMoments
from mpcompile.testing import tiny_cnn, tiny_data


@given(st.integers(1, 500), st.data())
def test_one_position_of_each_run_is_drawn(available: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, available))
    drawn = sampled_positions(available, count, 3, "layer 0")
    assert drawn.shape == (3, count)
    bounds = torch.arange(count + 1) * available // count
    assert bool(((drawn >= bounds[:-1]) & (drawn < bounds[1:])).all())  # hence different, ascending and in range


def test_the_key_determines_the_draw() -> None:
    one, same, other = (sampled_positions(1000, 64, 8, key) for key in ("a 0", "a 0", "a 1"))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one[0], one[1])  # images have positions of their own


def test_wide_layers_and_few_images_take_more_positions() -> None:
    assert positions_per_image(12544, 96, 600) == 64
    assert positions_per_image(196, 1152, 600) == 123
    assert positions_per_image(49, 1152, 600) == 49
    assert positions_per_image(12544, 96, 1) == 6144


@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.sampled_from([0, 1, (0, 1), "same", "valid"]),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4]),
    mode=st.sampled_from(["zeros", "reflect"]),
    seed=st.integers(0, 1000),
)
def test_rows_at_positions_are_those_of_the_unfolded_inputs(
    kernel: tuple[int, int], stride: tuple[int, int], padding: object, dilation: int, groups: int, mode: str, seed: int
) -> None:
    if padding == "same":
        stride = (1, 1)
    layer = nn.Conv2d(8, 4, kernel, stride, padding, dilation, groups, padding_mode=mode)  # type: ignore[arg-type]
    x = torch.randn(3, 8, 9, 7, generator=torch.Generator().manual_seed(seed))
    whole = columns(layer, x)
    each = whole.shape[1] // 3
    positions = sampled_positions(each, min(5, each), 3, str(seed))
    rows = (torch.arange(3)[:, None] * each + positions).flatten()
    assert torch.equal(columns_at(layer, x, positions), whole[:, rows])


def test_rows_of_a_linear_are_split_evenly_among_images() -> None:
    layer = nn.Linear(4, 3)
    x = torch.randn(6, 10, 4)  # three windows of ten tokens for each of two images
    positions = torch.tensor([[0, 11, 29], [5, 10, 20]])
    wanted = x.reshape(2, 30, 4)[torch.arange(2)[:, None], positions].reshape(1, 6, 4)
    assert torch.equal(columns_at(layer, x, positions), wanted)
    sampled, whole = SecondMoments(), SecondMoments()
    sampled.add(layer, x, product(layer, x), positions=positions)
    whole.add(layer, wanted[0], product(layer, wanted[0]))
    assert sampled.count == whole.count == 6
    torch.testing.assert_close(sampled.sum_xx, whole.sum_xx)
    torch.testing.assert_close(sampled.sum_yx, whole.sum_yx)


def counts(model: Model) -> dict[str, int]:
    """Rows of the moments of each layer, with 32 images."""
    names = ["body", "depthwise"]
    steps = layerwise(model, None, tiny_data(model, 32).calibration, names)
    return {step.weight.names[0]: step.moments.count for step in steps if step.moments is not None}


def test_large_maps_are_sampled_and_small_ones_are_not() -> None:
    model = tiny_cnn()
    found = counts(model)
    for name, count in found.items():
        layer = model.layer(name)
        at = {node.target: node for node in model.graph.graph.nodes}[name]
        height, width = at.meta["tensor_meta"].shape[-2:]
        assert count == 32 * positions_per_image(height * width, layer.weight[0].numel(), 32)
