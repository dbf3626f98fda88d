"""Fits what brings the compressed logits closest to the dense ones: a common factor, and a bias of each output.

The loss is the divergence KL(dense ‖ compressed) (mpcompile/measure/confidence.py). What it gains on images that the
fit has not seen is measured by cross-validation: the images are dealt into parts, and each part is judged with the fit
to the other parts. The standard error of the gain is that of its mean over images.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mpcompile.ir.head import Head
from mpcompile.measure.confidence import common_factor, divergences

STEPS = 200  # of L-BFGS, for the biases
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # strengths of the pull of the biases to 0, in nats


@dataclass(frozen=True, slots=True)
class LogitFit:
    """The logits z become pivot + factor × (z − pivot) + bias; the pivot is the threshold of the head, or 0.

    Attributes:
        factor: common to all outputs; it keeps every decision.
        error: the standard error of the factor.
        bias: of each output, (outputs,); None for none.
    """

    factor: float
    error: float = 0.0
    bias: Tensor | None = None

    def applied(self, logits: Tensor, head: Head) -> Tensor:
        """The logits (images, outputs, …) after the fit, in float64."""
        pivot = pivot_of(head)
        moved = pivot + self.factor * (logits.double() - pivot)
        if self.bias is None:
            return moved
        return moved + self.bias.view(-1, *[1] * (logits.ndim - 2))


@dataclass(frozen=True, slots=True)
class Gain:
    """How much less divergence, in nats, images have that a fit has not seen: the mean, and its standard error."""

    mean: float
    error: float

    @property
    def significant(self) -> bool:
        """Whether the gain is more than 2 standard errors."""
        return self.mean > 2 * self.error


def pivot_of(head: Head) -> float:
    """The logit that a factor leaves as it is: the threshold, so that no decision changes."""
    return 0.0 if head.kind == "softmax" else head.threshold


def fit_factor(dense: Tensor, compressed: Tensor, head: Head) -> LogitFit:
    """The factor with the least divergence."""
    found = common_factor(dense, compressed, head)
    assert found is not None
    return LogitFit(found.factor, found.standard_error)


def fit_bias(dense: Tensor, compressed: Tensor, head: Head, ridge: float) -> LogitFit:
    """The factor and the biases with the least divergence plus ridge × ‖bias‖² / 2 (L-BFGS, float64)."""
    from scipy.optimize import minimize

    start = fit_factor(dense, compressed, head)
    target, logits, pivot = dense.double(), compressed.double() - pivot_of(head), pivot_of(head)

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = torch.from_numpy(values.copy()).requires_grad_(True)
        with torch.enable_grad():
            moved = pivot + parameters[0] * logits + parameters[1:].view(-1, *[1] * (logits.ndim - 2))
            each = _loss(target, moved, head)
            total = each.mean() + ridge / 2 * parameters[1:].square().sum()
            [gradient] = torch.autograd.grad(total, [parameters])
        return float(total.detach()), gradient.numpy()

    first = np.array([start.factor, *[0.0] * dense.shape[1]])
    bounds = [(1e-3, None), *[(None, None)] * dense.shape[1]]
    found = minimize(loss, first, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": STEPS})
    return LogitFit(float(found.x[0]), start.error, torch.from_numpy(found.x[1:].copy()))


def _loss(dense: Tensor, moved: Tensor, head: Head) -> Tensor:
    """The divergence of each image up to a constant, with gradients, (images,)."""
    if head.kind == "softmax":
        each = -(dense.softmax(1) * moved.log_softmax(1)).sum(1)
    else:
        each = (torch.nn.functional.softplus(moved) - dense.sigmoid() * moved).sum(1)
    return each.flatten(1).mean(1) if each.ndim > 1 else each


def gain_of(
    fit: Callable[[Tensor, Tensor], LogitFit], dense: Tensor, compressed: Tensor, head: Head, parts: int, over: LogitFit
) -> Gain:
    """The gain of a kind of fit over the fit `over`, cross-validated: image i is in part i mod `parts`."""
    part = torch.arange(len(dense)) % parts
    gains = torch.zeros(len(dense), dtype=torch.float64)
    for index in range(parts):
        inside = part == index
        found = fit(dense[~inside], compressed[~inside])
        before, after = (
            divergences(dense[inside], one.applied(compressed[inside], head), head) for one in (over, found)
        )
        assert before is not None
        assert after is not None
        gains[inside] = before - after
    return Gain(float(gains.mean()), float(gains.std()) / len(gains) ** 0.5)
