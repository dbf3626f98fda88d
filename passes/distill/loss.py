r"""The loss of distillation, on tensors.

With logits z of the model and z_T of the dense model, labels y, temperature τ:

    (1 − α) · CE_ε(z, y) + α τ² KL(softmax(z_T/τ) ‖ softmax(z/τ)) + λ₁ ‖W‖₁ + λ₂ ‖W‖²_F

For heads that decide by a threshold (mpcompile/ir/head.py), each output is a logit of its own: softmax becomes the
sigmoid, CE_ε the binary cross-entropy, KL that of Bernoulli variables, each the mean over outputs. Outputs that are
probabilities are turned into logits first. Outputs that are values have no labels, and the second term is the mean
squared error of z over the variance of z_T, both over all values of the batch, without a temperature.

CE_ε is cross-entropy with label smoothing ε (Szegedy et al.), the second term is Hinton's distillation loss, and the
last two are the elastic net of Berlyand et al. (arXiv 2606.02608): each masked layer is W = S + R, with separate λ for
the kept part S and the removed part R. R is zero except while masks are soft. Without labels the first term is omitted,
and the second has weight 1.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mpcompile.ir.head import Head

SOFTMAX = Head()
SMALLEST = 1e-6  # probability, so that logits of probabilities are finite


@dataclass(frozen=True, slots=True)
class ElasticNet:
    """λ₁ and λ₂ on the kept and on the removed part of masked weights."""

    kept_l1: float = 0.0
    kept_l2: float = 0.0
    removed_l1: float = 0.0
    removed_l2: float = 0.0

    def __bool__(self) -> bool:
        return any((self.kept_l1, self.kept_l2, self.removed_l1, self.removed_l2))

    def of(self, weights: Iterable[tuple[Tensor, Bool[Tensor, "..."]]]) -> Float[Tensor, ""]:
        """The penalty of these weights, each given with its mask (True where kept)."""
        total = torch.zeros(())
        for weight, mask in weights:
            kept, removed = weight[mask], weight[~mask]
            total = total.to(weight.device) + self.kept_l1 * kept.abs().sum() + self.kept_l2 * kept.square().sum()
            total = total + self.removed_l1 * removed.abs().sum() + self.removed_l2 * removed.square().sum()
        return total


def labels_loss(
    outputs: Float[Tensor, "b ..."], labels: Int[Tensor, "b ..."], smoothing: float, head: Head = SOFTMAX
) -> Float[Tensor, ""]:
    """Cross-entropy CE_ε with label smoothing, the mean over images; labels (b, k) are for multilabel heads."""
    logits = _logits(outputs, head)
    if head.kind == "softmax":
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    targets = labels if head.kind == "multilabel" else labels[:, None]
    if head.kind == "ordinal":  # output i says whether the rank exceeds i
        targets = targets > torch.arange(logits.shape[1], device=logits.device)
    wanted = targets.float() * (1 - smoothing) + smoothing / 2
    return F.binary_cross_entropy_with_logits(logits, wanted)


def teacher_loss(
    outputs: Float[Tensor, "b ..."],
    dense: Float[Tensor, "b ..."],
    temperature: float,
    head: Head = SOFTMAX,
) -> Float[Tensor, ""]:
    """The distillation loss τ² KL(softmax(z_T/τ) ‖ softmax(z/τ)), the mean over images; for values a squared error."""
    if not head.decides:
        theirs = dense.float()
        variance = (theirs - theirs.mean()).square().mean().clamp_min(SMALLEST)
        return (outputs.float() - theirs).square().mean() / variance
    ours, theirs = _logits(outputs, head) / temperature, _logits(dense, head) / temperature
    if head.kind == "softmax":
        log_p, log_q = F.log_softmax(ours, dim=1), F.log_softmax(theirs, dim=1)
        return temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    wanted = theirs.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(theirs, wanted)
    return temperature**2 * (F.binary_cross_entropy_with_logits(ours, wanted) - entropy)


def _logits(outputs: Tensor, head: Head) -> Tensor:
    """The outputs as logits, in float32."""
    outputs = outputs.float()
    if not head.probabilities:
        return outputs
    return outputs.clamp_min(SMALLEST).log() if head.kind == "softmax" else torch.logit(outputs, eps=SMALLEST)
