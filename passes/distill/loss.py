r"""The loss of distillation, on tensors.

With logits z of the model and z_T of the dense model, labels y, temperature τ:

    (1 − α) · CE_ε(z, y) + α τ² KL(softmax(z_T/τ) ‖ softmax(z/τ)) + λ₁ ‖W‖₁ + λ₂ ‖W‖²_F

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


def labels_loss(logits: Float[Tensor, "b k"], labels: Int[Tensor, " b"], smoothing: float) -> Float[Tensor, ""]:
    """Cross-entropy CE_ε with label smoothing, the mean over images."""
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


def teacher_loss(logits: Float[Tensor, "b k"], dense: Float[Tensor, "b k"], temperature: float) -> Float[Tensor, ""]:
    """The distillation loss τ² KL(softmax(z_T/τ) ‖ softmax(z/τ)), the mean over images."""
    log_p = F.log_softmax(logits.float() / temperature, dim=1)
    log_q = F.log_softmax(dense.float() / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
