"""What is proven of the compressed model, on images that no pass has seen.

Let z(s) and z′(s) be the dense and the compressed model's logits of an image s, its shift ‖z − z′‖∞, and Δ(s) the dense
model's margin: its largest logit less its second.

- **An image.** If Δ(s) > 2 ‖z(s) − z′(s)‖∞ the prediction is the same: no logit can have overtaken another (Berlyand et
  al., arXiv 2606.02608, margin corollary, with the shift measured and not bounded). It is a theorem; of an image on
  which both models were run it says nothing that comparing the answers does not, but it says by what margin.
- **Images not seen.** If the n held-out images are drawn as those to come, and k of them agree, then with 95 %
  confidence the models agree on at least the Clopper–Pearson share: the p at which P(Binomial(n, p) ≥ k) = 5 %. It
  says nothing of images from elsewhere.
- **A layer.** A = S + R, A dense and S compressed. ‖Rψ(s)‖∞ is how far its outputs are from what its dense weights
  would make of the inputs ψ(s) that it now gets; biases are part of A and S. With L_s, the amplification from there to
  the logits, B = (2/n) Σ_s L_s ‖Rψ(s)‖∞ bounds the change of the cross entropy, and where the model was trained with
  penalties λ₂‖A‖² + λ₁‖A‖₁ the theorem certifies the change if

      B < λ₂ (‖A‖² − ‖S‖²) + λ₁ (‖A‖₁ − ‖S‖₁),

  which for a mask without refit is the paper's λ₂‖R‖² + λ₁‖R‖₁. L_s is unknown (the paper sets it constant), so what is
  given is the critical L: the largest constant at which the inequality holds.
- **Attribution.** The shift's square is shared out to the layers by its derivative along the straight path from dense
  to compressed weights, at the middle: Σ over a layer's weights of ⟨∂z/∂w · Δw, z′ − z⟩ / ‖z′ − z‖². It is first-order:
  the shares sum to 1 only as far as the logits are linear in the weights, and `explained` is their sum. The one
  backward pass it takes gives what a forward derivative (jvp) a layer would.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from mpcompile.analysis.layer_interpreter import LayerInterpreter
from mpcompile.data.images import Data, Split
from mpcompile.errors import PassError, UsageError
from mpcompile.ir.model import Model
from mpcompile.ir.results import Certificate, LayerCertificate
from mpcompile.ir.weight_groups import flat
from mpcompile.passes.dense_comparison import BATCH, attribution, changed, outputs_of, twin_of
from mpcompile.passes.reconstruct.second_moments import applied
from mpcompile.pipeline.pass_manager import Effect


@dataclass(frozen=True, slots=True)
class Certify:
    """Proves which held-out predictions cannot have changed, and bounds how many others agree.

    `weight_decay` (λ₂ of λ₂‖A‖²) and `l1` (λ₁) are the penalties that the model was trained with, where they are known;
    `attribute` is how many of the images share out the shift to the layers.
    """

    name: ClassVar[str] = "certify"
    effect: ClassVar[Effect] = Effect.ANALYSIS
    requires: ClassVar[tuple[str, ...]] = ()

    weight_decay: float = 0.0
    l1: float = 0.0
    confidence: float = 0.95
    attribute: int = 128

    def __post_init__(self) -> None:
        """Refuses what cannot be meant."""
        if not 0 < self.confidence < 1:
            raise UsageError(f"confidence is {self.confidence}; it is a probability between 0 and 1")
        if self.weight_decay < 0 or self.l1 < 0 or self.attribute < 0:
            raise UsageError("weight_decay, l1 and attribute are not negative")

    def __call__(self, model: Model, data: Data) -> Model:
        """The same model with its certificate; without held-out images or a lossy pass before it, without one."""
        if model.dense is None or not len(data.held_out):
            return model
        with torch.no_grad():
            before, after = outputs_of(model.dense, data.held_out), outputs_of(model.graph, data.held_out)
            if before.ndim != 2 or before.shape[1] < 2:
                raise PassError(f"the model gives {tuple(before.shape[1:])} an image; needed are two logits or more")
            reaches = reaches_of(model, data.held_out)
        some = replace(data.held_out, order=data.held_out.order[: self.attribute])
        shares = attribution(model, some) if self.attribute else {}
        layers = tuple(self._layer(model, name, reach, shares.get(name, 0.0)) for name, reach in reaches.items())
        found = certificate(before, after, self.confidence)
        return replace(model, certificate=replace(found, explained=sum(shares.values(), 0.0), layers=layers))

    def _layer(self, model: Model, name: str, reach: Tensor, share: float) -> LayerCertificate:
        critical = None
        if self.weight_decay or self.l1:
            dense, now = (side.weight.detach().double() for side in (twin_of(model, name), model.layer(name)))
            saved = self.weight_decay * (dense.square().sum() - now.square().sum())
            saved = saved + self.l1 * (dense.abs().sum() - now.abs().sum())
            critical = max(0.0, float(saved / (2 * reach.mean()).clamp_min(1e-300)))
        return LayerCertificate(name, float(reach.mean()), float(reach.max()), share, critical)


def certificate(before: Tensor, after: Tensor, confidence: float) -> Certificate:
    """What dense and compressed logits (n, outputs) prove by themselves; no layers yet."""
    agreeing = int((before.argmax(1) == after.argmax(1)).sum())
    shift = shift_of(before, after)
    return Certificate(
        images=len(before),
        agreeing=agreeing,
        proven=int(unchanged(before, after).sum()),
        agreement_bound=lower_bound(agreeing, len(before), confidence),
        confidence=confidence,
        shift_mean=float(shift.mean()),
        shift_max=float(shift.max()),
        margin_median=float(margin_of(before).median()),
        explained=0.0,
        layers=(),
    )


def unchanged(before: Tensor, after: Tensor) -> Tensor:
    """For each row of logits whether the dense margin exceeds twice the shift, so that the argmax is the same."""
    return margin_of(before) > 2 * shift_of(before, after)


def margin_of(logits: Tensor) -> Tensor:
    """Each row's largest logit less its second, in float64."""
    top = logits.double().topk(2, dim=1).values
    return top[:, 0] - top[:, 1]


def shift_of(before: Tensor, after: Tensor) -> Tensor:
    """Each row's largest change of a logit, in float64."""
    return (before.double() - after.double()).abs().amax(1)


def lower_bound(successes: int, trials: int, confidence: float) -> float:
    """The one-sided Clopper–Pearson bound: the least share that has not less than 1 − confidence to give as many."""
    from scipy.stats import beta

    return float(beta.ppf(1 - confidence, successes, trials - successes + 1)) if successes else 0.0


def reaches_of(model: Model, images: Split) -> dict[str, Tensor]:
    """‖Rψ(s)‖∞ for each changed layer and each image, ψ being what the layer now gets."""
    differences = {}
    for name in changed(model):
        old, now = twin_of(model, name), model.layer(name)
        bias = 0 if old.bias is None or now.bias is None else old.bias - now.bias
        differences[name] = (flat(old.weight - now.weight), bias)
    found: dict[str, list[Tensor]] = {name: [] for name in differences}
    seen: dict[str, Tensor] = {}

    def see(name: str, layer: nn.Linear | nn.Conv2d, x: Tensor, y: Tensor) -> None:
        if name not in differences:
            return
        matrix, bias = differences[name]
        reach = (applied(layer, matrix, x) + bias).abs().reshape(len(x), -1).amax(1)
        seen[name] = torch.maximum(seen[name], reach) if name in seen else reach  # applied at several places

    watcher = LayerInterpreter(model.graph, see)
    for pixels, _ in images.announced(BATCH):
        seen.clear()
        watcher.run(pixels.to(model.example.dtype))
        for name, reach in seen.items():
            found[name].append(reach)
    return {name: torch.cat(parts) for name, parts in found.items() if parts}
