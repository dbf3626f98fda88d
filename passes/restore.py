"""Prune–restore: fills unused N:M slots, then un-prunes the costliest layers until the accuracy limits hold.

Three steps (Berlyand et al., arXiv 2606.02608, prune–restore: A = S + Q + P, P stays removed and Q comes back):

1. Fill unused slots. Sparse kernels read N values of every M, whatever they are. A group that keeps fewer than N
   weights, or keeps zeros, has unused slots; they take the dense model's largest weights of that group. The mask pass
   leaves no unused slots, but masks from elsewhere may.
2. Merge fewer tokens. If the model merges tokens and exceeds a limit, the loss of merging alone (dense weights) and of
   the masks alone (no merging) are measured. While merging alone exceeds the limit, fewer tokens are merged; no mask is
   given back for it. After that, while both together exceed the limit, the one that loses more is reduced.
3. Un-prune layers. While the loss on the validation images exceeds a limit, the masked layer with the largest share of
   the logits' shift (first order, passes/dense_comparison.py) is masked and refitted again from its dense weights, at
   the mildest of `patterns` that it can have and that is milder than its own; if there is none, it becomes dense.
   The shares are measured again after each layer, since they depend on what was restored. Dense layers that were
   refitted to compensate masked ones (passes/reconstruct/dense_layers.py) return to their dense weights when no masked
   layer before them is left. The log gives the multiply-accumulates after each restored layer.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, fx, nn

from mpcompile.analysis.eligibility import graph_positions, reason_incompatible, tied_layers
from mpcompile.analysis.macs import cost
from mpcompile.data.images import Data, Split
from mpcompile.errors import PassError, UsageError, on_layer
from mpcompile.ir.head import Head
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.ir.pattern_choice import PatternChoice, pattern_for
from mpcompile.passes.dense_comparison import (
    accuracy_drop,
    attribution,
    dense_layer,
    measured_on,
    outputs_of,
    same_nodes,
    shift_and_spread,
)
from mpcompile.passes.nm_mask.nm_mask import NMMask
from mpcompile.passes.nm_mask.selection import nm_mask
from mpcompile.passes.reconstruct.dense_layers import layers_downstream
from mpcompile.passes.reconstruct.tied_weight import tied_weights
from mpcompile.passes.tome.merging_loss import MergingModel, merging_model
from mpcompile.pipeline.pass_record import Effect
from mpcompile.system.progress import tracked

log = logging.getLogger(__name__)
ATTRIBUTION = "token merging without masks"  # begins the note that says which of the two causes a loss


@dataclass(frozen=True, slots=True)
class Restore:
    """Fills unused N:M slots, then un-prunes layers, costliest first, until validation images are within the limits.

    If merged tokens lose more than the masks, fewer tokens are merged instead.

    Args:
        max_drop: limit on the drop of accuracy from the dense model, in percentage points; needs labels. Accuracy is
            the share of right decisions (mpcompile/ir/head.py), such as top-1. With a metric of the user's own, the
            drop is that of the metric, in its units.
        max_shift: limit on the mean over images of the largest change of a logit, as a share of the mean range of the
            dense logits of an image; for one output, of their range over the images.
        patterns: patterns to try for a layer before it becomes dense.

    The loss is measured on calibration images if there are no validation images. Without a limit, only slots are
    filled.
    """

    name: ClassVar[str] = "restore"
    effect: ClassVar[Effect] = Effect.LOSSY
    requires: ClassVar[tuple[str, ...]] = ()
    shares_work: ClassVar[bool] = True

    max_drop: float | None = None
    max_shift: float | None = None
    patterns: tuple[PatternChoice, ...] = ()

    def __post_init__(self) -> None:
        """Raises UsageError for a negative or infinite limit."""
        for what, limit in (("max_drop", self.max_drop), ("max_shift", self.max_shift)):
            if limit is not None and not 0 <= limit < float("inf"):
                raise UsageError(f"{what} is {limit}; give a limit of 0 or more")

    def __call__(self, model: Model, data: Data) -> Model:
        """The model within the limits, or with no masked layer left.

        Raises PassError if images, or labels for `max_drop`, are missing.
        """
        if model.dense is None:
            return model
        reference, model = model.dense, self._filled(model)
        if self.max_drop is None and self.max_shift is None:
            return model
        self.require_inputs(model, data)
        images = measured_on(data)
        with torch.no_grad():
            dense = outputs_of(reference, images)
        if self._within(model.graph, dense, images, model.head):
            return model
        merging = merging_model(model)
        note = "" if merging is None else self._note(merging, dense, images, bool(len(data.validation)))
        while (
            merging is not None
            and merging.step
            and not self._within(merging.merging_alone(), dense, images, model.head)
        ):
            merging = merging.weaker()
        counted, restored = cost(model), set[str]()
        steps = tracked([name for name, plan in model.plan.items() if plan.mask is not None], unit="layers")
        while not self._within(model.graph, dense, images, model.head):
            if merging is not None and self._merging_loses_more(merging, dense, images):
                merging = merging.weaker()
                counted = cost(model)
                continue
            next(steps, None)
            shares = attribution(model, images)
            masked = [name for name, plan in model.plan.items() if plan.mask is not None]
            if not masked:
                break
            worst = max(masked, key=lambda name: shares.get(name, 0.0))
            share = shares.get(worst, 0.0)
            reason = f"restored: masked, its share of the outputs' shift was {share:.0%}, past the limit"
            restored.add(worst)
            with on_layer(worst):
                model = self._restored(model, data, worst, reason)
            merging = None if merging is None else replace(merging, model=model)
            log.info(
                "%s goes to %s, its share of the shift was %.0f %%; %.3g multiply-accumulates an image are left",
                worst,
                model.plan_of(worst).pattern if model.plan_of(worst).mask is not None else "dense",
                100 * share,
                counted.executed_macs(model.patterns()),
            )
        if merging is None:
            return model
        if merging.schedule != merging.given:
            before, after = (", ".join(map(str, schedule)) for schedule in (merging.given, merging.schedule))
            note += f". Fewer tokens are merged after each attention: {after} instead of {before}"
        elif restored:
            note += ". As many tokens are merged as before"
        note += f". {len(restored)} masked layers were restored" if restored else ". No mask was given back"
        log.warning("restore: %s", note)
        return replace(model, notes=(note,))

    def require_inputs(self, model: Model, data: Data) -> None:
        """Raises PassError if images, or labels for `max_drop`, are missing."""
        if self.max_drop is None and self.max_shift is None:
            return
        images = measured_on(data)
        if not len(images):
            raise PassError("max_drop and max_shift are measured on validation images; give --data")
        if self.max_drop is not None and not images.judged:
            raise PassError("max_drop needs labels, and the validation images have none; give max_shift instead")

    def _filled(self, model: Model) -> Model:
        """The model with every slot of its patterns used."""
        plans = {}
        for name, plan in model.plan.items():
            if plan.mask is None or plan.pattern is None:
                continue
            with on_layer(name):
                layer, dense = model.layer(name), dense_layer(model, name).weight.detach()
                used = plan.mask & (layer.weight.detach() != 0)
                # The mask of a vocabulary has no free slots but kept weights that are zero.
                mask = plan.mask if plan.pattern.vocabulary else filled(used, dense, plan.pattern)
                new = mask & ~used
                if bool(new.any()):
                    with torch.no_grad():
                        layer.weight.copy_(torch.where(new, dense, layer.weight))
                    plans[name] = replace(plan, mask=mask)
        return model.with_plan(plans)

    def _note(self, merging: MergingModel, dense: Tensor, images: Split, validating: bool) -> str:
        """How much token merging and the masks lose alone, and the limit."""
        losses = [
            self._loss(graph, dense, images, merging.model.head)
            for graph in (merging.merging_alone(), merging.masks_alone())
        ]
        texts = []
        lost = "points of accuracy" if images.metric is None else f"of {images.metric.name}"
        where = f"on {len(images):,} {'validation' if validating else 'calibration'} images"
        if self.max_drop is not None:
            one, other = (drop for drop, _ in losses)
            texts.append(
                f"{ATTRIBUTION} loses {one:.2f} {lost} {where}, and the masks without token "
                f"merging {other:.2f}; the limit is {self.max_drop:g}"
            )
        if self.max_shift is not None:
            one, other = (shift for _, shift in losses)
            texts.append(
                f"{ATTRIBUTION} shifts the outputs by {one:.3g} of their range {where}, and the masks "
                f"without token merging by {other:.3g}; the limit is {self.max_shift:g}"
            )
        return "; ".join(texts)

    def _merging_loses_more(self, merging: MergingModel, dense: Tensor, images: Split) -> bool:
        """Whether token merging alone loses more than the masks alone, by the measure whose limit is exceeded."""
        if not any(merging.schedule):
            return False
        graphs = (merging.model.graph, merging.merging_alone(), merging.masks_alone())
        total, tokens, masks = (self._loss(graph, dense, images, merging.model.head) for graph in graphs)
        if self.max_drop is not None and total[0] > self.max_drop:
            return tokens > masks  # of equal drops, by the shift
        return tokens[1] > masks[1]

    def _loss(self, graph: fx.GraphModule, dense: Tensor, images: Split, head: Head | None) -> tuple[float, float]:
        """The drop of accuracy in points (0 without `max_drop`), and the shift relative to the range of the logits."""
        with torch.no_grad():
            outputs = outputs_of(graph, images)
        shift, spread = shift_and_spread(outputs, dense)
        drop = 0.0 if self.max_drop is None else accuracy_drop(outputs, dense, images, head)
        return drop, shift / spread if spread else 0.0

    def _within(self, graph: fx.GraphModule, dense: Tensor, images: Split, head: Head | None) -> bool:
        """Whether a graph is within both limits; `dense` are the dense model's outputs for the images."""
        with torch.no_grad():
            outputs = outputs_of(graph, images)
        if self.max_shift is not None:
            shift, spread = shift_and_spread(outputs, dense)
            if not shift <= self.max_shift * spread:
                return False
        return self.max_drop is None or accuracy_drop(outputs, dense, images, head) <= self.max_drop

    def _restored(self, model: Model, data: Data, name: str, reason: str) -> Model:
        """The model with one layer, and those that share its weight, at a milder pattern or dense."""
        names = next(group for group in tied_layers(model, [other for other, _ in model.layers()]) if name in group)
        plan, position = model.plan_of(name), graph_positions(model).get(name)
        layer = model.layer(name)
        allowed = [p for p in self.patterns if not reason_incompatible(layer, position, p)]
        own = [pattern_for(p, layer.weight.shape[1]) for p in allowed]
        milder = sorted((p for p in own if plan.pattern and p.density > plan.pattern.density), key=_density)
        with torch.no_grad():
            _copy_dense(model, names)
            if milder:
                # After token merging the nodes of the dense graph have other outputs, so they are no targets.
                reference = model.dense if model.dense and same_nodes(model.graph, model.dense) else None
                results = NMMask().mask_layers(model, data, dict.fromkeys(names, milder[0]), reference)
                plans = {
                    tied: replace(model.plan_of(tied), pattern=milder[0], mask=mask, relative_error=error)
                    for tied, (mask, error) in results.items()
                }
                return model.with_plan(plans)
        plans = {tied: replace(model.plan_of(tied), mask=None, relative_error=None, skipped=reason) for tied in names}
        return _without_needless_repairs(model.with_plan(plans))


def _copy_dense(model: Model, names: Sequence[str]) -> None:
    """Gives layers, and the batch normalizations that absorbed their mean shifts, the dense model's tensors."""
    for name in names:
        _copy(dense_layer(model, name), model.layer(name))
    for weight in tied_weights(model, names):
        if weight.norm is not None and model.dense is not None:
            path = next(path for path, module in model.graph.named_modules() if module is weight.norm)
            _copy(model.dense.get_submodule(path), weight.norm)


def _without_needless_repairs(model: Model) -> Model:
    """The model with dense weights in the refitted dense layers that no masked layer comes before any more."""
    downstream = layers_downstream(model, model.patterns())
    repaired = [name for name, plan in model.plan.items() if plan.mask is None and plan.relative_error is not None]
    needless = [name for name in repaired if name not in downstream]
    with torch.no_grad():
        _copy_dense(model, needless)
    return model.with_plan({name: replace(model.plan_of(name), relative_error=None) for name in needless})


def _copy(source: nn.Module, target: nn.Module) -> None:
    """Copies parameters and buffers from one module to another of the same structure."""
    for name, value in source.state_dict().items():
        target.state_dict()[name].copy_(value)


def _density(pattern: NM) -> float:
    return pattern.density


def filled(
    used: Bool[Tensor, "out in_ *taps"], dense: Float[Tensor, "out in_ *taps"], pattern: NM
) -> Bool[Tensor, "out in_ *taps"]:
    """The mask that keeps the used weights and fills each group of M up to N with the largest dense weights."""
    return nm_mask(torch.where(used, float("inf"), dense.abs()), pattern)
