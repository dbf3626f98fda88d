"""Prune–restore: what the pattern pays for is used, and layers that cost most go back until the loss is small enough.

Two steps (Berlyand et al., arXiv 2606.02608, prune–restore: A = S + Q + P, P stays removed and Q comes back).

1. A group of M that keeps fewer than N weights, or keeps zeros, pays for slots that it does not use: sparse kernels
   read N of every M whatever they hold. Such slots take the dense model's largest weights of their group. (A mask pass
   fills its slots itself; masks that were read from elsewhere may not.)
2. While the loss on validation images is above the limit, the masked layer with the largest share of the logits' shift
   (first order, passes/certify.py) goes to the mildest of `patterns` that it can carry and that is milder than its own,
   masked and refitted anew from its dense weights, or back to dense. The shares are measured anew after each, since
   they change with what was restored. Dense layers that were fitted to make up for masked ones
   (passes/reconstruct/dense_layers.py) go back with the last one before them. What this costs in multiply-accumulates
   is told as it goes.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, fx, nn

from mpcompile.analysis.eligibility import fact_against, places, tied
from mpcompile.analysis.macs import cost
from mpcompile.data.images import Data, Split
from mpcompile.errors import PassError, UsageError, on_layer
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.passes.dense_comparison import attribution, outputs_of, twin_of
from mpcompile.passes.nm_mask.nm_mask import NMMask
from mpcompile.passes.nm_mask.selection import nm_mask
from mpcompile.passes.reconstruct.dense_layers import after
from mpcompile.passes.reconstruct.layerwise import sites_of
from mpcompile.pipeline.pass_manager import Effect
from mpcompile.system.progress import tracked

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Restore:
    """Fills unused slots; takes layers back, worst first, until the loss on validation images is within the limits.

    `max_drop` is in points of top-1 against the dense model and needs labels; `max_shift` is the mean over images of
    the largest change of a logit, as a share of the dense logits' range. Without a limit only slots are filled.
    """

    name: ClassVar[str] = "restore"
    effect: ClassVar[Effect] = Effect.LOSSY
    requires: ClassVar[tuple[str, ...]] = ()

    max_drop: float | None = None
    max_shift: float | None = None
    patterns: tuple[NM, ...] = ()

    def __post_init__(self) -> None:
        """Refuses limits that mean nothing."""
        for what, limit in (("max_drop", self.max_drop), ("max_shift", self.max_shift)):
            if limit is not None and not 0 <= limit < float("inf"):
                raise UsageError(f"{what} is {limit}; it is a limit of 0 or more")

    def __call__(self, model: Model, data: Data) -> Model:
        """The model within the limits. Raises PassError where they cannot be measured."""
        if model.dense is None:
            return model
        reference, model = model.dense, self._filled(model)
        if self.max_drop is None and self.max_shift is None:
            return model
        images = data.validation if len(data.validation) else data.calibration
        if not len(images):
            raise PassError("a limit on the loss is measured on validation images; give --data")
        if self.max_drop is not None and not images.labelled:
            raise PassError("max_drop needs labelled images; give max_shift instead")
        with torch.no_grad():
            dense = outputs_of(reference, images)
        counted = cost(model)
        steps = tracked([name for name, plan in model.plan.items() if plan.mask is not None])
        while not self._within(model, dense, images):
            next(steps, None)
            shares = attribution(model, images)
            masked = [name for name, plan in model.plan.items() if plan.mask is not None]
            if not masked:
                break
            worst = max(masked, key=lambda name: shares.get(name, 0.0))
            share = shares.get(worst, 0.0)
            reason = f"restored: masked, its share of the logits' shift was {share:.0%}, past the limit"
            with on_layer(worst):
                model = self._taken_back(model, data, worst, reason)
            log.info(
                "%s goes to %s, its share of the shift was %.0f %%; %.3g multiply-accumulates an image are left",
                worst,
                model.plan_of(worst).pattern if model.plan_of(worst).mask is not None else "dense",
                100 * share,
                counted.executed_macs(model.patterns()),
            )
        return model

    def _filled(self, model: Model) -> Model:
        """The model with every slot of its patterns in use."""
        plans = {}
        for name, plan in model.plan.items():
            if plan.mask is None or plan.pattern is None:
                continue
            with on_layer(name):
                layer, dense = model.layer(name), twin_of(model, name).weight.detach()
                used = plan.mask & (layer.weight.detach() != 0)
                mask = filled(used, dense, plan.pattern)
                new = mask & ~used
                if bool(new.any()):
                    with torch.no_grad():
                        layer.weight.copy_(torch.where(new, dense, layer.weight))
                    plans[name] = replace(plan, mask=mask)
        return model.with_plan(plans)

    def _within(self, model: Model, dense: Tensor, images: Split) -> bool:
        """Whether the model is within both limits."""
        with torch.no_grad():
            found = outputs_of(model.graph, images)
        if self.max_shift is not None:
            shift = (found - dense).abs().flatten(1).amax(1).mean()
            spread = (dense.flatten(1).amax(1) - dense.flatten(1).amin(1)).mean()
            if not float(shift) <= self.max_shift * float(spread):
                return False
        if self.max_drop is not None:
            labels = torch.cat([labels for _, labels in images.batches()])
            before, after = ((z.argmax(1) == labels).double().mean() for z in (dense, found))
            return float(100 * (before - after)) <= self.max_drop
        return True

    def _taken_back(self, model: Model, data: Data, name: str, reason: str) -> Model:
        """The model with one layer, and those that share its weight, at a milder pattern or dense."""
        alike = next(group for group in tied(model, [other for other, _ in model.layers()]) if name in group)
        plan, where = model.plan_of(name), places(model)
        able = [p for p in self.patterns if plan.pattern and p.density > plan.pattern.density]
        able = sorted((p for p in able if not fact_against(model.layer(name), where.get(name), p)), key=_density)
        with torch.no_grad():
            _as_dense(model, alike)
            if able:
                # Where tokens were merged, the dense graph has no place for place the same outputs to be fitted to.
                reference = model.dense if model.dense and _same_nodes(model.graph, model.dense) else None
                found = NMMask().mask_layers(model, data, dict.fromkeys(alike, able[0]), reference)
                plans = {
                    t: replace(model.plan_of(t), pattern=able[0], mask=m, relative_error=e)
                    for t, (m, e) in found.items()
                }
                return model.with_plan(plans)
        back = model.with_plan(
            {t: replace(model.plan_of(t), mask=None, relative_error=None, skipped=reason) for t in alike}
        )
        return _unrepaired(back)


def _as_dense(model: Model, names: Sequence[str]) -> None:
    """Gives layers, and the batch normalisations that took up their shifts, what the dense model has there."""
    for name in names:
        _copy(twin_of(model, name), model.layer(name))
    for site in sites_of(model, names):
        if site.norm is not None and model.dense is not None:
            at = next(path for path, module in model.graph.named_modules() if module is site.norm)
            _copy(model.dense.get_submodule(at), site.norm)


def _unrepaired(model: Model) -> Model:
    """The model without what was done to dense layers for masked ones before them, where there are none any more."""
    reading = after(model, model.patterns())
    fitted = [name for name, plan in model.plan.items() if plan.mask is None and plan.relative_error is not None]
    alone = [name for name in fitted if name not in reading]
    with torch.no_grad():
        _as_dense(model, alone)
    return model.with_plan({name: replace(model.plan_of(name), relative_error=None) for name in alone})


def _copy(old: nn.Module, new: nn.Module) -> None:
    """Gives a module the parameters and buffers of another."""
    for name, value in old.state_dict().items():
        new.state_dict()[name].copy_(value)


def _same_nodes(one: fx.GraphModule, other: fx.GraphModule) -> bool:
    """Whether two graphs do the same operations in the same order."""
    return [node.target for node in one.graph.nodes] == [node.target for node in other.graph.nodes]


def _density(pattern: NM) -> float:
    return pattern.density


def filled(
    used: Bool[Tensor, "out in_ *taps"], dense: Float[Tensor, "out in_ *taps"], pattern: NM
) -> Bool[Tensor, "out in_ *taps"]:
    """N places in every group of M: those used first, then the largest dense weights."""
    return nm_mask(torch.where(used, float("inf"), dense.abs()), pattern)
