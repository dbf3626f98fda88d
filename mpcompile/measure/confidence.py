"""Confidence: predicted probabilities, their divergence from the dense model's, and the factor that minimises it.

A factor a > 0 on the logits changes how confident predictions are, and never a decision. The divergence is
KL(dense ‖ compressed) in nats. For a softmax over classes, with p the dense probabilities and z′ the compressed logits,

    KL(a) = Σ p log p − a Σ p z′ + log Σ exp(a z′),    KL′(a) = E_q[z′] − E_p[z′],    KL″(a) = Var_q[z′],

where q = softmax(a z′). It is convex in a, so its minimum is found by Newton's method. For heads that decide by a
threshold t (mpcompile/ir/head.py), each output is a Bernoulli variable, the divergence of an image is the sum over
outputs, and the factor scales the distance to the threshold: t + a (z′ − t). With t = 0 this is a factor on the logit.

Outputs are (images, outputs), or (images, outputs, …) with a decision at each position; then the divergence of an
image is the mean over its positions. Outputs that are probabilities are converted to logits first. All sums are in
float64, in chunks of images, so that memory does not grow with the number of images.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import logsigmoid

from mpcompile.ir.head import Head, head_for

SMALLEST_FACTOR, LARGEST_FACTOR = 1 / 32, 32.0
TOLERANCE = 1e-9  # relative, of the factor
STEPS = 100  # each at least halves the interval of log(factor)
CHUNK = 2**22  # values of a chunk of images in float64: 32 MiB
SUM_TOLERANCE = 1e-3  # of probabilities that sum to 1
TINY, ALMOST_ONE = 2.0**-126, 1 - 2.0**-24  # the range of probabilities that float32 tells from 0 and 1


@dataclass(frozen=True, slots=True)
class CommonFactor:
    """The positive factor on compressed logits that minimises the divergence from the dense model.

    Attributes:
        factor: within [SMALLEST_FACTOR, LARGEST_FACTOR].
        divergence: the mean over images with this factor, in nats.
        standard_error: of the factor, for images of the same distribution (sandwich estimate over images); infinity if
            the outputs do not determine it.
    """

    factor: float
    divergence: float
    standard_error: float


def divergences(
    dense: Tensor | NDArray[Any], compressed: Tensor | NDArray[Any], head: Head | None = None, factor: float = 1.0
) -> Tensor | None:
    """KL(dense ‖ compressed) of each image in nats, (images,), float64, with a factor on the compressed logits.

    None for outputs that are values.
    """
    rule = head_for(head, _tensor(dense))
    if not rule.decides:
        return None
    return torch.cat([_divergence(pair, factor) for pair in _pairs(dense, compressed, rule)])


def divergence(
    dense: Tensor | NDArray[Any], compressed: Tensor | NDArray[Any], head: Head | None = None, factor: float = 1.0
) -> float | None:
    """The mean over images of KL(dense ‖ compressed) in nats; None for outputs that are values."""
    each = divergences(dense, compressed, head, factor)
    return None if each is None else float(each.mean())


def common_factor(
    dense: Tensor | NDArray[Any], compressed: Tensor | NDArray[Any], head: Head | None = None
) -> CommonFactor | None:
    """The factor on the compressed logits that minimises the divergence; None for outputs that are values.

    Exactly 1 if both models have the same outputs, or if the compressed outputs are constant in each image.
    """
    rule = head_for(head, _tensor(dense))
    if not rule.decides:
        return None
    low, high, factor = SMALLEST_FACTOR, LARGEST_FACTOR, 1.0
    for _ in range(STEPS):
        slope, curvature = (float(each.sum()) for each in _derivatives(dense, compressed, rule, factor))
        if slope == 0:
            break
        low, high = (low, factor) if slope > 0 else (factor, high)
        following = factor - slope / curvature if curvature > 0 else 0.0
        if not low < following < high:
            following = (low * high) ** 0.5
        found = abs(following - factor) <= TOLERANCE * factor
        factor = following
        if found:
            break
    slopes, curvatures = _derivatives(dense, compressed, rule, factor)
    total = float(curvatures.sum())
    error = float(slopes.square().sum()) ** 0.5 / total if total > 0 else float("inf")
    left = divergence(dense, compressed, rule, factor)
    assert left is not None
    return CommonFactor(factor, left, error)


def top_probabilities(outputs: Tensor | NDArray[Any], head: Head | None = None) -> Tensor | None:
    """The predicted probability of each decision, float64, flattened; None for outputs that are values.

    That is the largest probability if one class is taken, (images × positions,), and otherwise for each output the
    probability of the side of the threshold that it is on, (images × positions × outputs,).
    """
    rule = head_for(head, _tensor(outputs))
    if not rule.decides:
        return None
    return torch.cat([*_top_by_chunk(outputs, rule)])


def _top_by_chunk(outputs: Tensor | NDArray[Any], head: Head) -> Iterator[Tensor]:
    """The predicted probability of each decision of a chunk of images, float64, flattened."""
    threshold = _threshold(outputs, head)
    for logits in _logits(outputs, head, threshold):
        if head.kind == "softmax" or threshold is None:
            yield (logits.softmax(1) if threshold is None else logits.sigmoid()).amax(1).flatten()
        else:
            sides = torch.where(logits > threshold, logits, -logits).sigmoid()
            yield (sides.movedim(1, -1) if sides.ndim > 2 else sides).flatten()


def mean_top_probability(outputs: Tensor | NDArray[Any], head: Head | None = None) -> float | None:
    """The mean predicted probability of the decisions; None for outputs that are values."""
    rule = head_for(head, _tensor(outputs))
    if not rule.decides:
        return None
    sums = [(float(chunk.sum()), len(chunk)) for chunk in _top_by_chunk(outputs, rule)]
    return sum(total for total, _ in sums) / sum(count for _, count in sums)


def as_logits(outputs: Tensor, head: Head) -> tuple[Tensor, Head]:
    """The outputs as logits, and the head that decides by them; both unchanged if the outputs are no probabilities.

    If one class is taken from outputs that end in a sigmoid each, the head becomes a multilabel one, whose divergence
    is that of the sigmoids.
    """
    if not head.probabilities or not head.decides:
        return outputs, head
    threshold = _threshold(outputs, head)
    kind = head.kind if head.kind != "softmax" or threshold is None else "multilabel"
    return torch.cat([*_logits(outputs, head, threshold)]), Head(kind, threshold or 0.0)


@dataclass(frozen=True, slots=True)
class _Pair:
    """The logits of both models for a chunk of images, (images, outputs, …); `threshold` is None for a softmax."""

    dense: Tensor
    compressed: Tensor
    threshold: float | None

    def scaled(self, factor: float) -> Tensor:
        """The compressed logits with a factor."""
        t = self.threshold or 0.0
        return self.compressed if factor == 1 else t + factor * (self.compressed - t)


def _divergence(pair: _Pair, factor: float) -> Tensor:
    """The divergence of each image of a chunk, (images,)."""
    now = pair.scaled(factor)
    if pair.threshold is None:
        before, after = pair.dense.log_softmax(1), now.log_softmax(1)
        each = (before.exp() * (before - after)).sum(1)
    else:
        yes, no = (
            (sign * pair.dense).sigmoid() * (logsigmoid(sign * pair.dense) - logsigmoid(sign * now)) for sign in (1, -1)
        )
        each = (yes + no).sum(1)
    return _by_image(each).clamp_min(0.0)  # rounding


def _derivatives(
    dense: Tensor | NDArray[Any], compressed: Tensor | NDArray[Any], head: Head, factor: float
) -> tuple[Tensor, Tensor]:
    """The first and second derivative of each image's divergence with respect to the factor, (images,) each."""
    slopes, curvatures = [], []
    for pair in _pairs(dense, compressed, head):
        now = pair.scaled(factor)
        if pair.threshold is None:
            # Relative to each image's largest logit, so that large common offsets cancel before they are multiplied.
            z = pair.compressed - pair.compressed.amax(1, keepdim=True)
            q = now.softmax(1)
            mean = (q * z).sum(1, keepdim=True)
            slope, curvature = ((q - pair.dense.softmax(1)) * z).sum(1), (q * (z - mean).square()).sum(1)
        else:
            z = pair.compressed - pair.threshold
            q = now.sigmoid()
            slope, curvature = ((q - pair.dense.sigmoid()) * z).sum(1), (q * (1 - q) * z.square()).sum(1)
        slopes.append(_by_image(slope))
        curvatures.append(_by_image(curvature))
    return torch.cat(slopes), torch.cat(curvatures)


def _pairs(dense: Tensor | NDArray[Any], compressed: Tensor | NDArray[Any], head: Head) -> Iterator[_Pair]:
    """The logits of both models, chunk by chunk."""
    threshold = _threshold(dense, head)
    for before, after in zip(*(_logits(side, head, threshold) for side in (dense, compressed)), strict=True):
        yield _Pair(before, after, threshold)


def _threshold(outputs: Tensor | NDArray[Any], head: Head) -> float | None:
    """The threshold as a logit, if each output is a Bernoulli variable; None for a softmax over the outputs.

    If one class is taken from outputs that end in a sigmoid each, so that their sum is not 1, these are Bernoulli
    variables too.
    """
    if head.kind == "softmax":
        sums = _tensor(outputs)[:64].double().sum(1)
        of_sigmoids = head.probabilities and bool(((sums - 1).abs() > SUM_TOLERANCE).any())
        return 0.0 if of_sigmoids else None
    return float(_logit(torch.tensor(head.threshold).double())) if head.probabilities else head.threshold


def _logits(outputs: Tensor | NDArray[Any], head: Head, threshold: float | None) -> Iterator[Tensor]:
    """Logits of chunks of images in float64; `threshold` is None for a softmax."""
    for chunk in in_chunks(_tensor(outputs)):
        values = chunk.double()
        if not head.probabilities:
            yield values
        else:
            yield values.clamp_min(TINY).log() if threshold is None else _logit(values)


def in_chunks(outputs: Tensor) -> tuple[Tensor, ...]:
    """The outputs in chunks of images of at most CHUNK values, or of one image."""
    chunks: tuple[Tensor, ...] = outputs.split(max(1, CHUNK // max(1, outputs[:1].numel())))
    return chunks


def _logit(probabilities: Tensor) -> Tensor:
    p = probabilities.clamp(TINY, ALMOST_ONE)
    return p.log() - (-p).log1p()


def _by_image(each: Tensor) -> Tensor:
    """The mean over positions, (images,), of values (images, …)."""
    return each.flatten(1).mean(1) if each.ndim > 1 else each


def _tensor(outputs: Tensor | NDArray[Any]) -> Tensor:
    return outputs.detach() if isinstance(outputs, Tensor) else torch.from_numpy(np.require(outputs, requirements="W"))
