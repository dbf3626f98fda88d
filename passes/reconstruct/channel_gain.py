"""Gains that give a refitted layer's outputs the dense outputs' variance, channel by channel.

Least squares predicts the conditional mean of the dense output, whose variance is smaller: by the share of the output
that the inputs cannot explain. So every refitted layer shrinks its output a little, and over the depth of a network the
logits shrink, with them the confidence of the answers. A gain √(E y² / E ŷ²) about the means undoes that in each layer,
before the next one is calibrated. It raises the squared error of the layer and lowers the divergence of the network: on
EfficientNet-Lite0 at 2:4 from 1.43 to 0.38 without any factor on the logits, from 0.373 to 0.288 after the best one,
and agreement rises from 78.2 to 81.0 % of 400 unseen images.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mpcompile.passes.reconstruct.second_moments import OutputMoments

LARGEST_GAIN = 1.6  # and its inverse the smallest; beyond it the layer explains so little that a gain adds noise
SMALLEST_ERROR = 1e-6  # relative; a channel with a smaller error has lost nothing


def channel_gains(outputs: OutputMoments, power: Float[Tensor, " out"]) -> Float[Tensor, " out"]:
    """The gain of each output channel; 1 where nothing was lost or either variance is zero.

    `outputs` are about the means; `power` is the variance of the dense outputs.
    """
    lost = outputs.error > SMALLEST_ERROR * outputs.target
    usable = lost & (outputs.own > 0) & (power > 0)
    gain = torch.where(usable, power, 1.0) / torch.where(usable, outputs.own, 1.0)
    return gain.sqrt().clamp(1 / LARGEST_GAIN, LARGEST_GAIN)
