"""What flows into each layer on calibration images: the root mean square of every input channel.

Sums are kept in float64 and only they are kept, so memory does not grow with the number of images.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mpcompile.data import Split
from mpcompile.model import Model
from mpcompile.watch import Watcher

BATCH = 32


def input_scales(model: Model, images: Split) -> dict[str, Float[Tensor, " channels"]]:
    """For each layer the root mean square of its inputs over images and positions, channel by channel, in float64.

    Channels are those of the layer's input: all groups' for a grouped convolution. Layers that the images do not
    reach are left out.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str, layer: nn.Linear | nn.Conv2d, x: Tensor, y: Tensor) -> None:
        channels_last = x if isinstance(layer, nn.Linear) else x.movedim(1, -1)
        rows = channels_last.reshape(-1, channels_last.shape[-1])
        total = rows.double().square().sum(0)
        sums[name] = sums[name] + total if name in sums else total
        counts[name] = counts.get(name, 0) + len(rows)

    watcher = Watcher(model.graph, add)
    with torch.no_grad():
        for pixels, _ in images.announced(BATCH):
            watcher.run(pixels.to(model.example.dtype))
    return {name: (total / counts[name]).sqrt() for name, total in sums.items()}


def per_weight(layer: nn.Linear | nn.Conv2d, scales: Float[Tensor, " channels"]) -> Float[Tensor, "out in_ *taps"]:
    """The scales laid out to multiply the layer's weight: for each weight that of its own input channel."""
    if isinstance(layer, nn.Linear):
        return scales[None, :].expand(layer.weight.shape)
    of_group = scales.reshape(layer.groups, -1)
    rows = of_group.repeat_interleave(layer.out_channels // layer.groups, 0)
    return rows[:, :, None, None].expand(layer.weight.shape)
