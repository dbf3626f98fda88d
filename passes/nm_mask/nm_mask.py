"""Zeroes all but N weights of every M input channels, and refits the kept ones by least squares.

For a mask, groups of M are consecutive input channels, per kernel tap. `rows` neighbouring output channels may share a
pattern. Which N of M are kept is decided by a criterion (passes/nm_mask/criteria/, one file each).

The refit goes layer by layer, on the inputs that each layer gets from the pruned layers before it
(passes/reconstruct/layerwise.py), by exact least squares (passes/reconstruct/least_squares.py):

- the dense layers between masked ones can be refitted too (passes/reconstruct/dense_layers.py);
- a layer before a residual add is fitted to restore the sum, not its own output alone (passes/reconstruct/residual.py);
- if the layer's bias, or the batch normalization after it, can absorb a change of the mean output, moments are about
  the mean and the bias is refitted too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, fx

from mpcompile.analysis.eligibility import eligible_patterns
from mpcompile.data.images import Data
from mpcompile.errors import PassError, UsageError, on_layer
from mpcompile.ir.model import LayerPlan, Model
from mpcompile.ir.pattern import NM, TWO_OF_FOUR
from mpcompile.ir.pattern_choice import PatternChoice, pattern_for
from mpcompile.ir.weight_groups import flat, unflat
from mpcompile.passes.nm_mask.criteria import CRITERIA, DEFAULT, DEFAULT_WITHOUT_REFIT
from mpcompile.passes.nm_mask.criterion import Criterion, MaskProblem
from mpcompile.passes.reconstruct.channel_gain import channel_gains
from mpcompile.passes.reconstruct.cross_validation import DAMPINGS, refit_problem
from mpcompile.passes.reconstruct.dense_layers import layers_to_repair
from mpcompile.passes.reconstruct.layerwise import LayerStep, layerwise
from mpcompile.passes.reconstruct.least_squares import damped, of_layer, refit, unconstrained
from mpcompile.passes.reconstruct.tied_weight import Layer, write
from mpcompile.pipeline.partial_results import PartialResults, run_key
from mpcompile.pipeline.pass_record import Effect
from mpcompile.system.distributed import broadcast, share

if TYPE_CHECKING:
    CriterionName = str
else:  # the values that a recipe accepts; type checkers cannot read a Literal from a table
    CriterionName = Literal[tuple(CRITERIA)]

RefitTarget = Literal["none", "layer", "model"]


@dataclass(frozen=True, slots=True)
class NMMask:
    """Masks layers to their planned N:M patterns, and refits the kept weights to the dense model.

    Stems, output layers, depthwise convolutions and layers whose width M does not divide stay dense, each with its
    reason in the plan (mpcompile/analysis/eligibility.py).

    Args:
        pattern: the pattern of layers without a planned one, or alternatives of one density (`50%`). If None, they get
            2:4, or stay dense if a budget planned patterns for other layers.
        criterion: how the kept weights are selected, a name in CRITERIA. Default: joint with calibration images and a
            refit, else magnitude.
        refit: what the kept weights are fitted to, on the inputs from the pruned layers before them. `model`: the
            dense model's outputs, which also compensates the error of those layers. `layer`: the outputs of the layer's
            own dense weights on these inputs. `none`: kept weights are not changed. Default: model with calibration
            images, else none.
        sequential: if False, every layer is calibrated on the dense model's inputs.
        repair: with the refit to the model, also refit layers that stay dense and follow masked ones; not output
            layers, nor layers excluded by name.
        residual: with the refit to the model, fit layers before a residual add to compensate the error of the skip
            branch too.
        gain: with the refit to the model, whether each output channel is scaled to the variance of the dense output, if
            the layer's bias or the batch normalization after it can absorb a change of the mean.
        damping: λ of the ridge term, relative to the mean second moment of the inputs. If None, it is chosen for each
            layer by cross-validation (passes/reconstruct/cross_validation.py), or is 0.02 with the refit to the layer.
        prior: α of the prior of the criterion covariance, which favours the layer's largest weights; 0 for none.
        prior_density: the share of weights that the prior favours, between 0 and 1.
        include: shell patterns over qualified names; layers to mask that stay dense by default.
        exclude: shell patterns over qualified names; layers that stay dense. Wins over `include`.
    """

    name: ClassVar[str] = "nm-mask"
    effect: ClassVar[Effect] = Effect.LOSSY
    requires: ClassVar[tuple[str, ...]] = ()
    shares_work: ClassVar[bool] = True

    pattern: PatternChoice | None = None
    criterion: CriterionName | None = None
    refit: RefitTarget | None = None
    sequential: bool = True
    repair: bool = True
    residual: bool = True
    gain: bool = True
    damping: float | None = None
    prior: float = 0.0
    prior_density: float = 0.65
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises UsageError if a value is out of range, or if two do not go together."""
        if self.criterion is not None and self.criterion not in CRITERIA:
            raise UsageError(f"criterion is {self.criterion!r}; the criteria are {', '.join(CRITERIA)}")
        criterion = None if self.criterion is None else CRITERIA[self.criterion]
        if criterion and criterion.needs_refit and self.refit == "none":
            raise UsageError(
                f"the criterion {self.criterion} selects weights for their refit, and refit is none; set refit to "
                "model or layer"
            )
        if self.damping is not None and not 0 < self.damping < float("inf"):
            raise UsageError(f"damping is {self.damping}; give a number above 0, as {DAMPINGS[0]}")
        if self.prior < 0:
            raise UsageError(f"prior is {self.prior}; give a number of 0 or more")
        if not 0 < self.prior_density < 1:
            raise UsageError(f"prior_density is {self.prior_density}; give a share between 0 and 1, as 0.65")
        if self.prior and not (criterion and criterion.uses_prior):
            with_prior = " or ".join(name for name, row in CRITERIA.items() if row.uses_prior)
            raise UsageError(f"prior is {self.prior}; it applies to one criterion, so set criterion to {with_prior}")

    @torch.no_grad()
    def __call__(self, model: Model, data: Data) -> Model:
        """The model with masked weights. Each layer's plan has its mask, or the reason why it stays dense.

        Raises PassError if no layer is eligible, if a layer already has a mask of another pattern, or if calibration
        images are needed and there are none.
        """
        eligible = eligible_patterns(model, self.pattern, self.include, self.exclude)
        if not any(isinstance(choice, NM) for choice in eligible.values()):
            shown = "; ".join(f"{name}: {reason}" for name, reason in list(eligible.items())[:3])
            what = self.pattern or TWO_OF_FOUR
            raise PassError(f"no layer takes {what} ({shown or 'the model has no Linear and no Conv2d'})")
        plans: dict[str, LayerPlan] = {}
        patterns: dict[str, NM | None] = {}  # of the layers to fit; None for those that stay dense
        for name, choice in eligible.items():
            with on_layer(name):
                plan = model.plan_of(name)
                if plan.mask is not None:  # from an earlier mask pass
                    own = self.pattern and pattern_for(self.pattern, model.layer(name).weight.shape[1])
                    if choice == plan.pattern and own not in (None, choice):
                        raise PassError(f"it is masked at {choice} already; exclude it from {own}")
                elif isinstance(choice, str):
                    if plan.skipped != choice:
                        plans[name] = replace(plan, skipped=choice)
                else:
                    patterns[name] = choice
        if patterns and self.repair and self.sequential and self._target(data) == "model":
            reasons = {name: choice for name, choice in eligible.items() if isinstance(choice, str)}
            patterns |= dict.fromkeys(layers_to_repair(model, patterns, reasons))
        for name, (mask, relative_error) in self.mask_layers(model, data, patterns).items():
            if patterns[name] is None:
                plans[name] = replace(plans.get(name, model.plan_of(name)), relative_error=relative_error)
            else:
                plans[name] = replace(
                    model.plan_of(name), pattern=patterns[name], mask=mask, relative_error=relative_error, skipped=None
                )
        return model.with_plan(plans)

    def _target(self, data: Data) -> RefitTarget:
        return self.refit or ("model" if len(data.calibration) else "none")

    def _criterion(self, data: Data) -> str:
        refitted = len(data.calibration) and self.refit != "none"
        return self.criterion or (DEFAULT if refitted else DEFAULT_WITHOUT_REFIT)

    def require_inputs(self, model: Model, data: Data) -> None:
        """Raises PassError if the criterion or the refit needs calibration images and there are none."""
        criterion, target = self._criterion(data), self._target(data)
        if len(data.calibration) or (not CRITERIA[criterion].needs_images and target == "none"):
            return
        what = f"the criterion {criterion}" if CRITERIA[criterion].needs_images else f"the refit to the {target}"
        raise PassError(
            f"{what} needs calibration images; give --data, or --criterion {DEFAULT_WITHOUT_REFIT} --refit none"
        )

    def mask_layers(
        self, model: Model, data: Data, patterns: Mapping[str, NM | None], dense: fx.GraphModule | None = None
    ) -> dict[str, tuple[Tensor, float | None]]:
        """Masks and refits these layers in place. Returns each layer's mask and its relative error.

        A layer whose pattern is None keeps all its weights and is only refitted. Targets are the outputs of `dense`; if
        that is None, of the model as it is. The relative error is E‖y − W′x‖² / E‖y‖² on the calibration images; None
        if no images were used. Raises PassError if calibration images are needed and there are none.
        """
        criterion, target = CRITERIA[self._criterion(data)], self._target(data)
        results: dict[str, tuple[Tensor, float | None]] = {}
        if not criterion.needs_images and target == "none":
            for name, pattern in patterns.items():
                assert pattern is not None  # layers without a pattern are only refitted
                with on_layer(name):
                    results[name] = (self._mask_only(model.layer(name), pattern, criterion), None)
            return results
        if not patterns:
            return {}
        self.require_inputs(model, data)
        stored = PartialResults(lambda: run_key(repr(self), model, patterns, data.calibration), share().first)
        finished = broadcast(frozenset(name for name in patterns if name in stored))
        residual = self.residual and target == "model"
        for step in layerwise(
            model,
            dense,
            data.calibration,
            list(patterns),
            sequential=self.sequential,
            residual=residual,
            finished=finished,
        ):
            first, *_ = step.weight.names
            with on_layer(first):
                if first in finished:
                    result = broadcast(stored.get(first))
                else:
                    result = broadcast(self._solve(step, patterns[first], criterion, target))
                    stored.put(first, result)
                write(step.weight, step.layer, result)
                for name in step.weight.names:
                    mask = result["mask"].reshape(model.layer(name).weight.shape)
                    results[name] = (mask, float(result["relative_error"]))
            del step  # frees its moments before those of the next layer are collected
        return results

    def _mask_only(self, layer: Layer, pattern: NM, criterion: Criterion) -> Tensor:
        """Masks the layer's weight in place without a refit or images. Returns the mask."""
        own = flat(layer.weight)
        mask = criterion.select(MaskProblem(own, own, own.new_empty(0, own.shape[1], own.shape[1]), pattern))
        mask = unflat(mask, layer.weight.shape)
        # Not a product with the mask, which would leave −0.0, and NaN for infinite weights.
        layer.weight.masked_fill_(~mask, 0.0)
        return mask

    def _solve(
        self, step: LayerStep, pattern: NM | None, criterion: Criterion, target: RefitTarget
    ) -> dict[str, Tensor]:
        """The tensors to write for one weight: `mask`, `weight`, `relative_error`, and `bias` if the mean is free."""
        assert step.moments is not None  # collected for every weight that is not finished
        layer, own = step.layer, flat(step.layer.weight)
        centred = step.weight.centred and target != "none"
        dense_power = None
        if target == "model":
            found = refit_problem(step, self.damping)
            problem, fitted, dense_power = found.reported, found.solved, found.dense_power
        elif target == "layer":
            problem = of_layer(step.moments.problem(centred), own, layer.bias if step.weight.biased else None)
            fitted = damped(problem, own, DAMPINGS[0] if self.damping is None else self.damping)
        else:
            problem = fitted = step.moments.problem(centred)
        best = own.double() if target == "none" else unconstrained(fitted)
        if pattern is None:
            mask, weight = torch.ones_like(own, dtype=torch.bool), best
        else:
            mask = criterion.select(MaskProblem(own, best, fitted.gram, pattern, self.prior, self.prior_density))
            weight = torch.where(mask, own.double(), 0) if target == "none" else refit(fitted, mask)
        outputs = problem.outputs(weight)
        if self.gain and centred and dense_power is not None:
            gain = channel_gains(outputs, dense_power)
            weight, outputs = weight * gain[:, None], outputs.times(gain)
        power = problem.power.sum()
        result = {
            "mask": unflat(mask, layer.weight.shape),
            "weight": unflat(weight, layer.weight.shape).to(layer.weight.dtype),
            "relative_error": outputs.error.sum() / power if power > 0 else torch.zeros(()),
        }
        if centred:
            result["bias"] = problem.bias(weight)
        return result
