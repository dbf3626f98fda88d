"""A metric and samples that runs name as `own_metric:NAME`."""

from typing import Any

import torch
from torch import Tensor

from mpcompile.testing import Noise

SAMPLES = 48


def samples() -> list[tuple[Tensor, Tensor]]:
    """Noise, and as target the sign of its mean and of its first pixel."""
    images = [Noise((1, 8, 8), SAMPLES)[index][0] for index in range(SAMPLES)]
    return [(image, torch.stack([image.mean(), image[0, 0, 0]]).sign()) for image in images]


def closeness(outputs: Tensor, targets: Any) -> Tensor:
    """Minus the distance of the first two outputs from the target, for each sample."""
    distance: Tensor = (outputs.flatten(1)[:, :2] - targets).abs().mean(1)
    return -distance


def of_the_batch(outputs: Tensor, targets: Any) -> float:
    """The mean of `closeness` over a batch."""
    return float(closeness(outputs, targets).mean())
