"""Certificates: what is proven about the compressed model's predictions, on images that no other pass has seen.

Let z(s) and z′(s) be the logits of the dense and the compressed model for an image s. The shift is ‖z − z′‖∞. The
margin Δ(s) is the dense model's largest logit minus its second largest. For decisions by a threshold t on each output
(mpcompile/ir/head.py) it is 2 min_k |z_k(s) − t|, since a decision changes only if one output crosses t.

- **One image.** If Δ(s) > 2 ‖z(s) − z′(s)‖∞, the prediction is the same: no other logit can have become the largest,
  and none can have crossed the threshold (Berlyand et al., arXiv 2606.02608, margin corollary, with a measured shift in
  place of a bound). This is a theorem. On an image that both models have run on, a comparison of the predictions shows
  the same; the theorem adds how large the safety margin is.
  Outputs without one decision for each image, such as embeddings and maps, have no certificate.
- **Unseen images.** Suppose the n held-out images are drawn from the same distribution as future ones, and k
  predictions agree. Then with 95 % confidence the models agree on at least the Clopper–Pearson share: the p at which
  P(Binomial(n, p) ≥ k) = 5 %. This says nothing about images from other distributions.
- **One layer.** A = S + R, with A the dense and S the compressed weights, biases included. ψ(s) are the layer's inputs
  in the compressed model, and ‖Rψ(s)‖∞ is the distance between its outputs and those of its dense weights on ψ(s). L_s
  is the amplification from there to the logits. B = (2/n) Σ_s L_s ‖Rψ(s)‖∞ bounds the change of the cross entropy. If
  the model was trained with penalties λ₂‖A‖² + λ₁‖A‖₁, the theorem certifies the change if

      B < λ₂ (‖A‖² − ‖S‖²) + λ₁ (‖A‖₁ − ‖S‖₁).

  For a mask without refit the right side is the paper's λ₂‖R‖² + λ₁‖R‖₁. L_s is unknown; the paper sets it constant. So
  the report gives the critical L, the largest constant for which the inequality holds.
- **Attribution.** Each layer's share of the squared shift is its derivative along the straight path from dense to
  compressed weights, at the midpoint: Σ over the layer's weights of ⟨∂z/∂w · Δw, z′ − z⟩ / ‖z′ − z‖². This is first
  order: the shares sum to 1 only as far as the logits are linear in the weights. `explained` is their sum. One backward
  pass gives the shares of all layers, where forward derivatives (jvp) would take one pass per layer.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from mpcompile.analysis.layer_interpreter import LayerInterpreter
from mpcompile.data.images import Data, Split
from mpcompile.errors import UsageError
from mpcompile.ir.batch import arguments, primary
from mpcompile.ir.head import Head, head_for
from mpcompile.ir.model import Model
from mpcompile.ir.results import Certificate, LayerCertificate
from mpcompile.ir.weight_groups import flat
from mpcompile.measure.margin_agreement import agreement_by_margin
from mpcompile.passes.dense_comparison import (
    BATCH,
    FIRST_IMAGE,
    attribution,
    changed_layers,
    dense_layer,
    outputs_of,
)
from mpcompile.passes.reconstruct.layer_rows import applied
from mpcompile.pipeline.pass_record import Effect
from mpcompile.system.distributed import shared_map

CHUNK_BYTES = 64 << 20  # of unfolded inputs at once


@dataclass(frozen=True, slots=True)
class Certify:
    """Proves which held-out predictions are unchanged, and bounds the agreement on unseen images.

    Args:
        weight_decay: λ₂ of the penalty λ₂‖A‖² that the model was trained with; 0 if unknown.
        l1: λ₁ of the penalty λ₁‖A‖₁ that the model was trained with; 0 if unknown.
        confidence: confidence of the bound on unseen images, between 0 and 1.
        attribute: how many held-out images the attribution uses; 0 for none.
    """

    name: ClassVar[str] = "certify"
    effect: ClassVar[Effect] = Effect.ANALYSIS
    requires: ClassVar[tuple[str, ...]] = ()
    shares_work: ClassVar[bool] = True

    weight_decay: float = 0.0
    l1: float = 0.0
    confidence: float = 0.95
    attribute: int = 128

    def __post_init__(self) -> None:
        """Raises UsageError if a value is out of range."""
        if not 0 < self.confidence < 1:
            raise UsageError(f"confidence is {self.confidence}; it is a probability between 0 and 1")
        if self.weight_decay < 0 or self.l1 < 0 or self.attribute < 0:
            negative = [row for row in ("weight_decay", "l1", "attribute") if getattr(self, row) < 0]
            raise UsageError(f"{negative[0]} is {getattr(self, negative[0])}; give a number of 0 or more")

    def __call__(self, model: Model, data: Data) -> Model:
        """The same model with its certificate.

        Without one if there are no held-out images or no earlier lossy pass; with a note instead if the outputs have no
        decision, or one at each position.
        """
        if model.dense is None or not len(data.held_out):
            return model
        with torch.no_grad():
            example = model(model.example_inputs)
            if not (head := head_for(model.head, example)).decides:
                return replace(model, notes=("no certificate: the output has no decision that could be proven",))
            if example.ndim != 2:
                return replace(
                    model, notes=("no certificate: it needs one decision for each image, not for positions",)
                )
            before = outputs_of(model.dense, data.held_out)
            after, errors = outputs_and_errors(model, data.held_out)
        some = replace(data.held_out, order=data.held_out.order[: self.attribute])
        shares = attribution(model, some) if self.attribute else {}
        layers = tuple(self._layer(model, name, error, shares.get(name, 0.0)) for name, error in errors.items())
        logits_only = certificate(before, after, self.confidence, head)
        return replace(model, certificate=replace(logits_only, explained=sum(shares.values(), 0.0), layers=layers))

    def _layer(self, model: Model, name: str, error: Tensor, share: float) -> LayerCertificate:
        """The certificate of one layer from its output error per image; the critical L if a penalty is known."""
        critical = None
        if self.weight_decay or self.l1:
            dense, now = (side.weight.detach().double() for side in (dense_layer(model, name), model.layer(name)))
            saved = self.weight_decay * (dense.square().sum() - now.square().sum())
            saved = saved + self.l1 * (dense.abs().sum() - now.abs().sum())
            critical = max(0.0, float(saved / (2 * error.mean()).clamp_min(1e-300)))
        return LayerCertificate(name, float(error.mean()), float(error.max()), share, critical)


def certificate(before: Tensor, after: Tensor, confidence: float, head: Head | None = None) -> Certificate:
    """The certificate from dense and compressed logits, each (images, outputs); no attribution, no layers."""
    head = head_for(head, before)
    agreeing = int(head.same(before, after).sum())
    shift, margin = shift_of(before, after), head.margin(before)
    return Certificate(
        images=len(before),
        agreeing=agreeing,
        proven=int(unchanged(before, after, head).sum()),
        agreement_bound=lower_bound(agreeing, len(before), confidence),
        confidence=confidence,
        shift_mean=float(shift.mean()),
        shift_max=float(shift.max()),
        margin_median=float((2 * margin if head.kind == "softmax" else margin).median()),
        explained=0.0,
        layers=(),
        head=head.kind,
        quartiles=agreement_by_margin(before, after, head) or (),
    )


def unchanged(before: Tensor, after: Tensor, head: Head | None = None) -> Tensor:
    """For each row of logits, whether the shift is below the change that the decision needs, which proves it."""
    return head_for(head, before).margin(before) > shift_of(before, after)


def shift_of(before: Tensor, after: Tensor) -> Tensor:
    """Each row's largest absolute change of a logit, in float64."""
    return (before.double() - after.double()).abs().amax(1)


def lower_bound(successes: int, trials: int, confidence: float) -> float:
    """The one-sided Clopper–Pearson bound: the rate p at which P(at least `successes` of `trials`) = 1 − confidence."""
    from scipy.stats import beta

    return float(beta.ppf(1 - confidence, successes, trials - successes + 1)) if successes else 0.0


def _taps(layer: nn.Linear | nn.Conv2d) -> int:
    """How many weights of an output multiply each input channel."""
    return 1 if isinstance(layer, nn.Linear) else math.prod(layer.kernel_size)


def outputs_and_errors(model: Model, images: Split) -> tuple[Tensor, dict[str, Tensor]]:
    """The model's outputs (images, outputs), and ‖Rψ(s)‖∞ for each changed layer, by name, and each image, (images,).

    ψ(s) are the layer's inputs in the compressed model. If several nodes apply the layer, the largest value counts.
    """
    differences = {}
    for name in changed_layers(model):
        old, now = dense_layer(model, name), model.layer(name)
        bias = 0 if old.bias is None or now.bias is None else old.bias - now.bias
        differences[name] = (flat(old.weight - now.weight), bias)
    of_batch: dict[str, Tensor] = {}

    def measure(name: str, layer: nn.Linear | nn.Conv2d, x: Tensor, y: Tensor) -> None:
        if name not in differences:
            return
        matrix, bias = differences[name]
        # A few images at a time: unfolded inputs of a convolution are many times its inputs.
        each = max(1, CHUNK_BYTES // (x[0].numel() * x.element_size() * _taps(layer)))
        parts = [(applied(layer, matrix, part) + bias).abs().reshape(len(part), -1).amax(1) for part in x.split(each)]
        error = torch.cat(parts)
        of_batch[name] = torch.maximum(of_batch[name], error) if name in of_batch else error

    interpreter = LayerInterpreter(model.graph, measure)

    def of_order(order: tuple[int, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        of_batch.clear()
        outputs = interpreter.run(*arguments(images.inputs_of(order), model.example.dtype))
        return primary(outputs), dict(of_batch)

    outputs, parts = zip(*shared_map(of_order, images.batch_orders(BATCH), FIRST_IMAGE, "images", len), strict=True)
    errors = {name: torch.cat([part[name] for part in parts]) for name in differences if name in parts[0]}
    return torch.cat(outputs), errors
