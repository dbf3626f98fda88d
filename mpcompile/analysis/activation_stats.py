"""Per-channel input statistics from calibration images.

RMS, and the standard deviation that remains after regressing a channel on the layer's other channels. Only sums are
kept, in float64, so memory does not grow with the number of images.
"""

from collections.abc import Callable, Collection

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mpcompile.analysis.layer_interpreter import LayerHook, LayerInterpreter
from mpcompile.data.images import Split
from mpcompile.ir.batch import arguments
from mpcompile.ir.model import Model

BATCH = 32  # images
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

    _run_with_hook(model, images, add)
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
    """
    shifts: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    grams: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    wanted = {
        name: MIN_ROWS_PER_CHANNEL * layer.weight.shape[1]
        for name, layer in model.layers()
        if names is None or name in names
    }

    def add(name: str, layer: nn.Linear | nn.Conv2d, x: Tensor, y: Tensor) -> None:
        if name not in wanted or counts.get(name, 0) >= wanted[name]:
            return
        groups = getattr(layer, "groups", 1)
        by_group = (rows := _rows(layer, x)).reshape(len(rows), groups, -1).movedim(1, 0)
        # The first batch's mean is subtracted, so that a large mean does not cost float32 digits.
        shift = shifts.setdefault(name, by_group.mean(1, keepdim=True))
        moved = by_group - shift
        total, gram = moved.sum(1, dtype=torch.float64), (moved.mT @ moved).double()
        sums[name] = sums[name] + total if name in sums else total
        grams[name] = grams[name] + gram if name in grams else gram
        counts[name] = counts.get(name, 0) + len(rows)

    _run_with_hook(model, images, add, lambda: all(counts.get(name, 0) >= rows for name, rows in wanted.items()))
    scales = {}
    for name, count in counts.items():
        mean = sums[name] / count
        covariance = grams.pop(name) / count - mean[:, :, None] * mean[:, None]
        size = covariance.diagonal(dim1=1, dim2=2).mean(1)
        damping = torch.where(size > 0, DAMPING * size, 1.0)[:, None, None]
        eye = torch.eye(covariance.shape[-1], dtype=torch.float64)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance + damping * eye))
        scales[name] = inverse.diagonal(dim1=1, dim2=2).rsqrt().flatten()
    return scales


def _rows(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Float[Tensor, "rows channels"]:
    """The layer's inputs as a matrix with one row for each image and position."""
    channels_last = x if isinstance(layer, nn.Linear) else x.movedim(1, -1)
    return channels_last.reshape(-1, channels_last.shape[-1])


def _run_with_hook(model: Model, images: Split, hook: LayerHook, enough: Callable[[], bool] = lambda: False) -> None:
    """Runs the model on the images in batches until `enough`, and calls `hook` for each application of each layer."""
    interpreter = LayerInterpreter(model.graph, hook)
    with torch.no_grad():
        for inputs, _ in images.announced(BATCH):
            interpreter.run(*arguments(inputs, model.example.dtype))
            if enough():
                return


def per_weight(layer: nn.Linear | nn.Conv2d, scales: Float[Tensor, " channels"]) -> Float[Tensor, "out in_ *taps"]:
    """The scales of a layer's input channels, expanded to the shape of its weight.

    Each weight gets the scale of the input channel that it multiplies.
    """
    if isinstance(layer, nn.Linear):
        return scales[None, :].expand(layer.weight.shape)
    by_group = scales.reshape(layer.groups, -1)
    rows = by_group.repeat_interleave(layer.out_channels // layer.groups, 0)
    return rows[:, :, None, None].expand(layer.weight.shape)
