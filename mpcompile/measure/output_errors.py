"""How far each output of a model moved: relative error and cosine of an image's values, for any kind of output."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mpcompile.ir.parity import fixed_values


@dataclass(frozen=True, slots=True)
class OutputError:
    """Errors of an output against a reference, over images.

    Attributes:
        relative: ‖Δ‖₂ / ‖y‖₂ of each image, the largest.
        cosine: of each image's values, the smallest.
    """

    relative: float
    cosine: float


def output_error(expected: Tensor, found: Tensor) -> OutputError | None:
    """The errors of outputs (images, …) of one shape; None if their values are not floating-point.

    An output that is zero in both models has the error 0 and the cosine 1. Values that are the same for every image in
    both are left out, as for parity.
    """
    if not expected.is_floating_point():
        return None
    y, z = (side.double().reshape(len(side), -1) for side in (expected, found))
    fixed = torch.from_numpy(fixed_values(y.numpy(force=True), z.numpy(force=True))).to(y.device)
    if fixed.any() and not fixed.all():
        y, z = y[:, ~fixed], z[:, ~fixed]
    norms, moved = y.norm(dim=1), (z - y).norm(dim=1)
    relative = torch.where(moved > 0, moved / norms, 0.0)
    products = norms * z.norm(dim=1)
    cosine = torch.where(products > 0, (y * z).sum(1) / products, (moved == 0).double())
    return OutputError(float(relative.max()), float(cosine.min()))
