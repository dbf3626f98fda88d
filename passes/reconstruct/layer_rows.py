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
    groups, taps = layer.groups, layer.kernel_size[0] * layer.kernel_size[1]
    if taps == 1 and layer.stride == (1, 1) and not any(_padding(layer, x)):
        rows = x.movedim(1, -1).reshape(-1, groups, x.shape[1] // groups)
        return rows.movedim(1, 0)
    unfolded = F.unfold(_padded(layer, x), layer.kernel_size, dilation=layer.dilation, stride=layer.stride)
    by_channel = unfolded.reshape(len(x), groups, x.shape[1] // groups, taps, -1)
    return by_channel.permute(1, 0, 4, 3, 2).reshape(groups, -1, taps * (x.shape[1] // groups))


def columns_at(
    layer: nn.Linear | nn.Conv2d, x: Tensor, positions: Int[Tensor, "images k"]
) -> Float[Tensor, "groups rows columns"]:
    """The rows of `columns` at some output positions or tokens of each image, without unfolding the others.

    Positions count from 0 in the order of `columns`. The result has k rows for each image, in the order given. The
    first axis of a convolution's inputs must be the images; the rows of a Linear are split evenly among the images.
    """
    image = torch.arange(len(positions))[:, None]
    if isinstance(layer, nn.Linear):
        rows = x.reshape(len(positions), -1, layer.in_features)
        return rows[image, positions].reshape(1, -1, layer.in_features)
    padded = _padded(layer, x)
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    width = (padded.shape[3] - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1  # of the output
    top, left = positions // width * stride[0], positions % width * stride[1]
    down = top[..., None] + torch.arange(kernel[0]) * dilation[0]  # images, k, kernel height
    across = left[..., None] + torch.arange(kernel[1]) * dilation[1]
    patches = padded[image[:, :, None, None], :, down[..., :, None], across[..., None, :]]  # images, k, h, w, in
    by_group = patches.reshape(positions.numel(), -1, layer.groups, x.shape[1] // layer.groups)
    return by_group.permute(2, 0, 1, 3).reshape(layer.groups, positions.numel(), -1)


def _padded(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """The input with the layer's padding."""
    padding = _padding(layer, x)
    if not any(padding):
        return x
    return F.pad(x, padding, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)


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
