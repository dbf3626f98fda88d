"""What flows into each layer on calibration images: how large every input channel is, and how much it alone tells.

Sums are kept in float64 and only they are kept, so memory does not grow with the number of images.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mpcompile.analysis.layer_interpreter import LayerHook, LayerInterpreter
from mpcompile.data.images import Split
from mpcompile.ir.model import Model

BATCH = 32
MIN_ROWS_PER_CHANNEL = 16  # rows a channel, after which a covariance is known well enough
DAMPING = 0.02  # of the mean variance; also what a refit adds unless it is told otherwise


def input_scales(model: Model, images: Split) -> dict[str, Float[Tensor, " channels"]]:
    """For each layer the root mean square of its inputs over images and positions, channel by channel, in float64.

    Channels are those of the layer's input: all groups' for a grouped convolution. Layers that the images do not
    reach are left out.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str, layer: nn.Linear | nn.Conv2d, x: Tensor, y: Tensor) -> None:
        rows = _rows(layer, x)
        total = rows.double().square().sum(0)
        sums[name] = sums[name] + total if name in sums else total
        counts[name] = counts.get(name, 0) + len(rows)

    _watched(model, images, add)
    return {name: (total / counts[name]).sqrt() for name, total in sums.items()}


def unexplained_scales(model: Model, images: Split) -> dict[str, Float[Tensor, " channels"]]:
    """For each layer and input channel the deviation of what the other channels do not tell of it, in float64.

    That is 1/√[(C + λI)⁻¹]_cc, C the covariance of the channels over images and positions and λ a share of its mean
    diagonal. A weight times it is, squared, what removing that weight costs once all others have been refitted (Optimal
    Brain Surgeon, Hassibi and Stork 1993); for a kernel of several taps each is taken as if it were alone. Channels as
    for `input_scales`, those of a group among themselves.
    """
    shifts: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    grams: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str, layer: nn.Linear | nn.Conv2d, x: Tensor, y: Tensor) -> None:
        groups = getattr(layer, "groups", 1)
        by_group = (rows := _rows(layer, x)).reshape(len(rows), groups, -1).movedim(1, 0)
        if counts.get(name, 0) >= MIN_ROWS_PER_CHANNEL * by_group.shape[-1]:
            return
        # Less the first mean, so that a large one costs float32 no digits.
        shift = shifts.setdefault(name, by_group.mean(1, keepdim=True))
        moved = by_group - shift
        total, gram = moved.sum(1, dtype=torch.float64), (moved.mT @ moved).double()
        sums[name] = sums[name] + total if name in sums else total
        grams[name] = grams[name] + gram if name in grams else gram
        counts[name] = counts.get(name, 0) + len(rows)

    _watched(model, images, add)
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
    """The inputs with a row for each image and position."""
    channels_last = x if isinstance(layer, nn.Linear) else x.movedim(1, -1)
    return channels_last.reshape(-1, channels_last.shape[-1])


def _watched(model: Model, images: Split, see: LayerHook) -> None:
    """Runs the model on the images; `see` is told of every layer's inputs."""
    watcher = LayerInterpreter(model.graph, see)
    with torch.no_grad():
        for pixels, _ in images.announced(BATCH):
            watcher.run(pixels.to(model.example.dtype))


def per_weight(layer: nn.Linear | nn.Conv2d, scales: Float[Tensor, " channels"]) -> Float[Tensor, "out in_ *taps"]:
    """The scales laid out to multiply the layer's weight: for each weight that of its own input channel."""
    if isinstance(layer, nn.Linear):
        return scales[None, :].expand(layer.weight.shape)
    of_group = scales.reshape(layer.groups, -1)
    rows = of_group.repeat_interleave(layer.out_channels // layer.groups, 0)
    return rows[:, :, None, None].expand(layer.weight.shape)
