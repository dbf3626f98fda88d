"""Per-channel input statistics from calibration images.

RMS, and the standard deviation that remains after regressing a channel on the layer's other channels. Only sums are
kept, in float64, so memory does not grow with the number of images.
"""

import math
from collections.abc import Collection

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mpcompile.analysis.layer_interpreter import LayerInterpreter
from mpcompile.data.images import Split
from mpcompile.ir.batch import arguments
from mpcompile.ir.model import Model
from mpcompile.system.distributed import all_reduced, share
from mpcompile.system.progress import tracked

BATCH = 32  # images
FIRST_IMAGES = 4  # of which the means are taken that are subtracted from all
MIN_ROWS_PER_CHANNEL = 16  # rows per input channel, after which a covariance estimate is accurate enough
DAMPING = 0.02  # share of the mean variance that is added to the diagonal; also the default damping of a refit


def input_scales(model: Model, images: Split) -> dict[str, Float[Tensor, " channels"]]:
    """For each layer, the root mean square of each input channel over images and positions, in float64.

    A grouped convolution has the channels of all its groups. Layers that the graph does not apply are left out.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str, layer: nn.Linear | nn.Conv2d, x: Tensor, y: Tensor) -> None:
        rows = _rows(layer, x)
        total = rows.double().square().sum(0)
        sums[name] = sums[name] + total if name in sums else total
        counts[name] = counts.get(name, 0) + len(rows)

    interpreter = LayerInterpreter(model.graph, add)
    with torch.no_grad():
        for inputs, _ in images.announced(BATCH):
            interpreter.run(*arguments(inputs, model.example.dtype))
    return {name: (total / counts[name]).sqrt() for name, total in sums.items()}


def conditional_scales(
    model: Model, images: Split, names: Collection[str] | None = None
) -> dict[str, Float[Tensor, " channels"]]:
    """For each layer of these names, or for all, each input channel's conditional standard deviation, in float64.

    It is the one given the layer's other channels: 1/√[(C + λI)⁻¹]_cc, with C the channels' covariance over images and
    positions, and λ = DAMPING times its mean diagonal. Its square times a squared weight is the cost of removing
    that weight if all others are refitted: the saliency of Optimal Brain Surgeon (Hassibi and Stork 1993). For a kernel
    with several taps, each tap is treated as if it were the only one. Channels are as for `input_scales`; in a grouped
    convolution, each is conditioned on the channels of its group. A covariance takes no further batch once it has
    MIN_ROWS_PER_CHANNEL rows for each channel, and no further images are run once all have.

    In a process group each rank runs its own batches. The scales are rounded to 16 bits, which the order of the sums in
    float64 does not reach: they are the same for any number of ranks.
    """
    shifts, rows_per_image = _means(model, images.first_inputs(FIRST_IMAGES), names)
    sums = {name: torch.zeros_like(shift, dtype=torch.float64) for name, shift in shifts.items()}
    grams = {name: total.mT @ total for name, total in sums.items()}
    counts = dict.fromkeys(shifts, 0)
    batches_needed = {
        name: math.ceil(MIN_ROWS_PER_CHANNEL * shift.shape[-1] / (rows_per_image[name] * BATCH))
        for name, shift in shifts.items()
    }
    number = 0

    def add(name: str, layer: nn.Linear | nn.Conv2d, x: Tensor, y: Tensor) -> None:
        if number >= batches_needed.get(name, 0):
            return
        moved = _by_group(layer, x) - shifts[name]
        sums[name] += moved.sum(1, dtype=torch.float64, keepdim=True)
        grams[name] += moved.mT @ moved
        counts[name] += moved.shape[1]

    interpreter, here = LayerInterpreter(model.graph, add), share()
    batches = images.batch_orders(BATCH)
    own = range(here.rank, min(len(batches), max(batches_needed.values(), default=0)), here.size)
    with torch.no_grad():
        for number in tracked(own, "batch {}".format, "images", lambda index: len(batches[index])):
            interpreter.run(*arguments(images.inputs_of(batches[number]), model.example.dtype))
    scales = {}
    for name, total in sums.items():
        scales[name] = _conditional(*map(all_reduced, (torch.tensor(counts[name]), total, grams.pop(name))))
    return scales


def _means(
    model: Model, inputs: tuple[Tensor, ...], names: Collection[str] | None
) -> tuple[dict[str, Float[Tensor, "groups one channels"]], dict[str, float]]:
    """For each layer that the inputs reach, the means of its input channels by group, and its rows for an image.

    The means are subtracted from all inputs, so that large ones cost no float32 digits.
    """
    means: dict[str, Tensor] = {}
    rows: dict[str, float] = {}

    def add(name: str, layer: nn.Linear | nn.Conv2d, x: Tensor, y: Tensor) -> None:
        if names is None or name in names:
            by_group = _by_group(layer, x)
            means.setdefault(name, by_group.mean(1, keepdim=True))
            rows[name] = rows.get(name, 0) + by_group.shape[1] / len(inputs[0])

    with torch.no_grad():
        LayerInterpreter(model.graph, add).run(*arguments(inputs, model.example.dtype))
    return means, rows


def _conditional(
    count: Tensor, total: Float[Tensor, "groups one channels"], gram: Float[Tensor, "groups channels channels"]
) -> Float[Tensor, " scales"]:
    """The conditional standard deviations from the sums of x and x xᵀ over `count` rows, rounded to 16 bits."""
    mean = total / count
    covariance = gram / count - mean.mT * mean
    size = covariance.diagonal(dim1=1, dim2=2).mean(1)
    damping = torch.where(size > 0, DAMPING * size, 1.0)[:, None, None]
    eye = torch.eye(covariance.shape[-1], dtype=torch.float64)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance + damping * eye))
    mantissa, exponent = torch.frexp(inverse.diagonal(dim1=1, dim2=2).rsqrt().flatten())
    return torch.ldexp((mantissa * 2**16).round() / 2**16, exponent)


def _by_group(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Float[Tensor, "groups rows channels"]:
    """The layer's inputs with one row for each image and position, by convolution group."""
    rows = _rows(layer, x)
    return rows.reshape(len(rows), getattr(layer, "groups", 1), -1).movedim(1, 0)


def _rows(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Float[Tensor, "rows channels"]:
    """The layer's inputs as a matrix with one row for each image and position."""
    channels_last = x if isinstance(layer, nn.Linear) else x.movedim(1, -1)
    return channels_last.reshape(-1, channels_last.shape[-1])


def per_weight(layer: nn.Linear | nn.Conv2d, scales: Float[Tensor, " channels"]) -> Float[Tensor, "out in_ *taps"]:
    """The scales of a layer's input channels, expanded to the shape of its weight.

    Each weight gets the scale of the input channel that it multiplies.
    """
    if isinstance(layer, nn.Linear):
        return scales[None, :].expand(layer.weight.shape)
    by_group = scales.reshape(layer.groups, -1)
    rows = by_group.repeat_interleave(layer.out_channels // layer.groups, 0)
    return rows[:, :, None, None].expand(layer.weight.shape)
