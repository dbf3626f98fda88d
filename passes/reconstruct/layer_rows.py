"""The inputs and outputs of a layer as matrices with one row per output position or token.

`columns` (im2col) turns a convolution into a Linear on unfolded inputs, with the taps outside and the input channels
inside. That is the order of mpcompile.ir.weight_groups.flat, in which groups of M run along the input channels of one
tap.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mpcompile.ir.weight_groups import flat


def columns(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Float[Tensor, "groups rows columns"]:
    """The inputs unfolded (im2col): one row per output position or token, one column per weight of an output."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, layer.in_features)
    groups, per_group = layer.groups, x.shape[1] // layer.groups
    padded = _padded(layer, x)
    by_group: Tensor = _patches(layer, padded).unflatten(1, (groups, per_group))
    # From images, groups, channels of a group, height, width, kernel height and width.
    return by_group.permute(1, 0, 3, 4, 5, 6, 2).reshape(groups, -1, layer.weight[0].numel())


def _patches(layer: nn.Conv2d, padded: Tensor) -> Float[Tensor, "images in_ height width kh kw"]:
    """A view of the inputs of each output position."""
    down, across = _output_size(layer, padded)
    images, channels, row, column = padded.stride()
    return padded.as_strided(
        (len(padded), padded.shape[1], down, across, *layer.kernel_size),
        (
            images, channels, row * layer.stride[0], column * layer.stride[1],
            row * layer.dilation[0], column * layer.dilation[1],
        ),
    )  # fmt: skip


def _output_size(layer: nn.Conv2d, padded: Tensor) -> tuple[int, int]:
    """The height and width of the output for a padded input."""
    down, across = (
        (size - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, dilation in zip(
            padded.shape[2:], layer.kernel_size, layer.stride, layer.dilation, strict=True
        )
    )
    return down, across


def columns_at(
    layer: nn.Linear | nn.Conv2d, x: Tensor, positions: Int[Tensor, "images k"]
) -> Float[Tensor, "groups rows columns"]:
    """The rows of `columns` at some output positions or tokens of each image, without unfolding the others.

    Positions count from 0 in the order of `columns`. The result has k rows for each image, in the order given. The
    first axis of a convolution's inputs must be the images; the rows of a Linear are split evenly among the images.
    """
    if isinstance(layer, nn.Linear):
        rows = x.reshape(len(positions), -1, layer.in_features)
        return rows[torch.arange(len(positions))[:, None], positions].reshape(1, -1, layer.in_features)
    padded = _padded(layer, x)
    (_, across), (high, wide) = _output_size(layer, padded), padded.shape[2:]
    taps = [torch.arange(kernel) * step for kernel, step in zip(layer.kernel_size, layer.dilation, strict=True)]
    corner = positions // across * layer.stride[0] * wide + positions % across * layer.stride[1]
    pixel = (corner[..., None, None] + taps[0][:, None] * wide + taps[1]).flatten(1)  # images, k · kh · kw
    groups, per_group = layer.groups, x.shape[1] // layer.groups
    if per_group == 1:
        found = padded.flatten(2).gather(2, pixel[:, None].expand(-1, groups, -1))
        return found.transpose(0, 1).reshape(groups, positions.numel(), -1)
    row = (pixel + torch.arange(len(x))[:, None] * high * wide).flatten()
    found = padded.movedim(1, -1).flatten(0, 2).index_select(0, row)
    by_group = found.reshape(positions.numel(), -1, groups, per_group)
    return by_group.permute(2, 0, 1, 3).reshape(groups, positions.numel(), -1)


def _padded(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """The input with the layer's padding, in the memory format in which its rows are copied fastest.

    With several channels in a group these are the last axis of a row, so adjacent channels; else adjacent positions.
    """
    padding = _padding(layer, x)
    if any(padding):
        x = F.pad(x, padding, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    return x.contiguous(memory_format=torch.contiguous_format if layer.groups == x.shape[1] else torch.channels_last)


def _padding(layer: nn.Conv2d, x: Tensor) -> tuple[int, int, int, int]:
    """The padding of this input in pixels: left, right, top, bottom."""
    if type(layer).__name__ == "Conv2dSame" or layer.padding == "same":
        sides: list[int] = []
        for size, kernel, stride, dilation in zip(
            x.shape[-2:], layer.kernel_size, layer.stride, layer.dilation, strict=True
        ):
            total = max(0, (-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size)
            sides = [total // 2, total - total // 2, *sides]
        return (sides[0], sides[1], sides[2], sides[3])
    if isinstance(layer.padding, str):  # "valid"
        return (0, 0, 0, 0)
    top, left = layer.padding
    return (left, left, top, top)


def rows_of(layer: nn.Linear | nn.Conv2d, y: Tensor) -> Float[Tensor, "rows out"]:
    """The layer's outputs as a matrix, with the rows of `columns`."""
    return y.reshape(-1, y.shape[-1]) if isinstance(layer, nn.Linear) else y.movedim(1, -1).reshape(-1, y.shape[1])


def applied(layer: nn.Linear | nn.Conv2d, matrix: Float[Tensor, "out columns"], x: Tensor) -> Float[Tensor, "rows out"]:
    """The layer's outputs with `matrix` as its flat weight and without bias, with the rows of `columns`."""
    rows = columns(layer, x)
    by_group = rows @ matrix.reshape(len(rows), -1, matrix.shape[1]).mT
    return by_group.movedim(0, 1).reshape(rows.shape[1], -1)


def product(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Float[Tensor, "rows out"]:
    """The layer's outputs without its bias, with the rows of `columns`."""
    return applied(layer, flat(layer.weight.detach()), x)
