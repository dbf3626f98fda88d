"""Gives the compressed model the dense model's confidence back, by one factor on the logits that keeps every decision.

Layerwise least squares shrinks what each layer predicts, so a compressed network is less sure of its answers: compact
batch-norm networks lose most of their divergence from the dense model that way. The factor with the least divergence
KL(dense ‖ compressed) is fitted on images that no refit has seen, the validation images, and folded into the weights
and biases of the layers that compute the logits. The exported model has the same operations as before.

The model is left as it is, and the reason is reported,

- if the factor cannot be folded into weights (passes/confidence/logit_layers.py);
- if the factor is 1 within its standard error, or closer to 1 than SMALLEST;
- if the gain on images that the fit has not seen is within its noise, by cross-validation.

A factor a > 0 takes the logits z to a z, or to t + a (z − t) if decisions compare them with a threshold t: the order of
the outputs and the side of the threshold stay the same, up to rounding.
"""

import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from mpcompile.data.images import Data
from mpcompile.errors import PassError, UsageError
from mpcompile.ir.batch import arguments
from mpcompile.ir.head import Head, head_for
from mpcompile.ir.model import Model
from mpcompile.ir.quantization import quantizers
from mpcompile.measure.confidence import as_logits, divergence, mean_top_probability
from mpcompile.passes.confidence.fit import RIDGES, Gain, LogitFit, fit_bias, fit_factor, gain_of
from mpcompile.passes.confidence.fold import fold, require_foldable
from mpcompile.passes.confidence.logit_layers import NotFoldable, logit_layers
from mpcompile.passes.dense_comparison import BATCH, measured_on, outputs_of
from mpcompile.pipeline.pass_record import Effect

log = logging.getLogger(__name__)
FEWEST = 16  # images: with fewer, a standard error says little
SMALLEST = 0.01  # distance of the factor from 1; closer ones change probabilities by less than anyone reads
LEFT = "confidence is left as it is"  # begins the note if nothing changes


@dataclass(frozen=True, slots=True)
class Confidence:
    """Fits one factor on the logits to the dense model's probabilities, and folds it into the last layers.

    Args:
        bias: whether a bias of each output is fitted too. It can change answers.
        parts: number of parts of the images, for the cross-validation.
    """

    name: ClassVar[str] = "confidence"
    effect: ClassVar[Effect] = Effect.LOSSY
    requires: ClassVar[tuple[str, ...]] = ()
    shares_work: ClassVar[bool] = True

    bias: bool = False
    parts: int = 5

    def __post_init__(self) -> None:
        """Raises UsageError if a value is out of range."""
        if self.parts < 2:
            raise UsageError(f"parts is {self.parts}; give 2 or more")

    def require_inputs(self, model: Model, data: Data) -> None:
        """Raises PassError if there are no images."""
        if not len(measured_on(data)):
            raise PassError("the factor is fitted on validation images; give --data")

    @torch.no_grad()
    def __call__(self, model: Model, data: Data) -> Model:
        """The model with the factor in the plan of its last layers (`logit_factor`), or as it was; with a note.

        Raises PassError if there are no images, or if the model is already quantised.
        """
        self.require_inputs(model, data)
        if quantizers(model.graph):
            raise PassError("the model is already quantised; put confidence before quantize")
        try:
            result, note = self._fitted(model, data)
        except NotFoldable as reason:
            result, note = model, f"{LEFT}: a factor on the logits cannot be folded into weights, since {reason}"
        log.info("%s", note)
        return replace(result, notes=(*model.notes, note))

    def _fitted(self, model: Model, data: Data) -> tuple[Model, str]:
        """The model with the factor folded in, or as it was, and a note. Raises NotFoldable."""
        images, where = measured_on(data), "validation" if len(data.validation) else "calibration"
        if model.dense is None:
            return model, f"{LEFT}: no pass before it changes what the model computes"
        head = head_for(model.head, model(model.example_inputs))
        if not head.decides:
            return model, f"{LEFT}: the outputs are values, which have none"
        layers = logit_layers(model, head)
        if len(images) < FEWEST:
            return model, f"{LEFT}: {len(images)} {where} images are too few to fit it; {FEWEST} are needed"
        raw = outputs_of(model.dense, images)
        (dense, rule), (now, _) = as_logits(raw, head), as_logits(outputs_of(model.graph, images), head)
        require_foldable(model, layers, rule, biased=False)
        chosen, gain = LogitFit(1.0), Gain(0.0, 0.0)
        if not torch.equal(dense, now):
            chosen, gain = self._chosen(dense, now, rule)
        if chosen.factor == 1 and chosen.bias is None:
            return model, f"{LEFT}: {_why_not(dense, now, rule, gain)}, on {len(images):,} {where} images"
        fold(model, layers, chosen, arguments(images.first_inputs(BATCH), model.example.dtype), head)
        plans = {
            name: replace(plan, logit_factor=chosen.factor * (plan.logit_factor or 1.0))
            for name, plan in ((name, model.plan_of(name)) for name in layers.names)
        }
        note = _told(dense, now, rule, chosen, gain)
        unseen = "" if len(data.validation) else ". The refit saw these images, so the factor is too small: give more"
        return model.with_plan(plans), (
            f"{note}, on {len(images):,} {where} images; folded into {' and '.join(layers.names)}{unseen}"
        )

    def _chosen(self, dense: Tensor, now: Tensor, head: Head) -> tuple[LogitFit, Gain]:
        """The fit to apply, and its gain on unseen images; a factor of 1 if no fit gains more than noise."""
        one = LogitFit(1.0)
        gain = gain_of(partial(fit_factor, head=head), dense, now, head, self.parts, one)
        factor = fit_factor(dense, now, head)
        if not gain.significant or abs(factor.factor - 1) <= max(2 * factor.error, SMALLEST):
            factor = one
        if not self.bias:
            return factor, gain
        # The biases have to gain over the factor; the strength of the ridge is the best of a few.
        fits = [partial(fit_bias, head=head, ridge=ridge) for ridge in RIDGES]
        gains = [gain_of(fit, dense, now, head, self.parts, factor) for fit in fits]
        best = max(range(len(fits)), key=lambda index: gains[index].mean)
        return (fits[best](dense, now), gains[best]) if gains[best].significant else (factor, gain)


def _why_not(dense: Tensor, now: Tensor, head: Head, gain: Gain) -> str:
    """Why no factor is applied."""
    if torch.equal(dense, now):
        return "the outputs are those of the dense model"
    best = fit_factor(dense, now, head)
    found = f"the best factor on the logits is {best.factor:.4g} (standard error {best.error:.1g})"
    if abs(best.factor - 1) <= 2 * best.error:
        return f"{found}, which is 1 within its noise"
    if not gain.significant:
        return f"{found}, and gains {gain.mean:.2g} nats on unseen images (standard error {gain.error:.1g}): noise"
    return f"{found}, which is too close to 1 to matter"


def _told(dense: Tensor, now: Tensor, head: Head, fit: LogitFit, gain: Gain) -> str:
    """What the fit changes on the images that it was fitted on, and what it gains on unseen ones."""
    after = fit.applied(now, head)
    divergences = [divergence(dense, side, head) for side in (now, after)]
    tops = [mean_top_probability(side, head) for side in (now, after, dense)]
    what = f"a factor of {fit.factor:.3f} on the logits" + ("" if fit.bias is None else " and a bias of each output")
    return (
        f"{what} (standard error {fit.error:.3f}): the divergence from the dense model goes from {divergences[0]:.3g} "
        f"to {divergences[1]:.3g} nats ({gain.mean:.2g} of it gained on unseen images, standard error {gain.error:.2g})"
        f" and the mean top probability from {tops[0]:.3f} to {tops[1]:.3f} (dense {tops[2]:.3f})"
    )
