"""Zero all but the N best weights of every M input channels, and make the best of those that stay.

For a score s ≥ 0 of the weight's shape, groups g of M consecutive input channels (per kernel tap) and blocks of
`rows` neighbouring output channels that share a pattern, the mask keeps in each group the N largest of

    S[block, g, m] = Σ over the rows of the block of s[row, g, m].

No other choice of N keeps a larger total score, since groups do not interact. The criteria, each with its score:

- `magnitude`: s = |W|, so the kept sum of |W| is the largest possible (as in NVIDIA's ASP); needs no images;
- `wanda`: s = u² E[x²], what removing a weight alone costs in squared output (Sun et al., arXiv 2306.11695);
- `covariance`: from there, swaps within each group while they lower what removing costs together
  (passes/nm_mask/pair_swaps.py);
- `joint`: the support is found together with the weights on it (passes/nm_mask/admm.py).

The kept weights are then refitted by exact least squares (passes/reconstruct/least_squares.py), layer by layer on what
the layers before now give (passes/reconstruct/layerwise.py), and with them the layers between that stay dense
(passes/reconstruct/dense_layers.py); before a residual sum to what the sum was, not to the layer's output alone
(passes/reconstruct/residual.py). With a refit, u is the best dense weight for these inputs, and x is taken about its
mean where the bias is free to follow; without, u is the layer's own weight.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool
from torch import Tensor, fx

from mpcompile.analysis.activation_stats import DAMPING
from mpcompile.analysis.eligibility import eligible
from mpcompile.data.images import Data
from mpcompile.errors import PassError, UsageError, on_layer
from mpcompile.ir.model import LayerPlan, Model
from mpcompile.ir.pattern import NM, TWO_OF_FOUR
from mpcompile.ir.weight_groups import flat, unflat
from mpcompile.passes.nm_mask.admm import joint_support
from mpcompile.passes.nm_mask.pair_swaps import swapped
from mpcompile.passes.nm_mask.selection import largest, masked, nm_mask
from mpcompile.passes.reconstruct.dense_layers import repairable
from mpcompile.passes.reconstruct.layerwise import Layer, TiedWeight, rewrite_in_order
from mpcompile.passes.reconstruct.least_squares import damped, of_layer, proven_share, put, refit, unconstrained
from mpcompile.passes.reconstruct.second_moments import LeastSquares, SecondMoments
from mpcompile.pipeline.partial_results import PartialResults, run_key
from mpcompile.pipeline.pass_manager import Effect

Criterion = Literal["magnitude", "wanda", "covariance", "joint"]


Target = Literal["none", "layer", "model"]


@dataclass(frozen=True, slots=True)
class NMMask:
    """Masks every layer for which a pattern is planned, and by `pattern` those for which none is; refits what is kept.

    Without `pattern` the layers that a budget planned nothing for stay dense; where there was no budget, it is 2:4.
    Stems, output layers, depthwise convolutions and widths that M does not divide stay dense, each with its
    reason in the plan. `include` and `exclude` are shell patterns over qualified module names.

    `refit` says what the kept weights are to reproduce from the inputs that the masked layers before them give:
    `model`, what the dense model has at that place, which also makes up for what those layers lost; `layer`, what the
    layer's own dense weights make of these inputs; `none`: they stay as they are. With calibration images `criterion`
    is joint and `refit` model unless they are set; without, magnitude and none. Not `sequential`, every layer is
    calibrated on the dense model's inputs. With `repair` and the refit to the model, layers that stay dense and follow
    masked ones are fitted to the dense model too (passes/reconstruct/dense_layers.py), unless they are output layers or
    excluded by name. With `residual` and the refit to the model, layers whose outputs are added to another value are
    fitted to make up for what that value has lost, too, as far as images tell (passes/reconstruct/residual.py).
    `damping` is explained in passes/reconstruct/least_squares.py. `prior` (α) holds the criterion covariance to the
    largest weights of the layer, as many as `prior_density` says.
    """

    name: ClassVar[str] = "nm-mask"
    effect: ClassVar[Effect] = Effect.LOSSY
    requires: ClassVar[tuple[str, ...]] = ()

    pattern: NM | None = None
    criterion: Criterion | None = None
    refit: Target | None = None
    sequential: bool = True
    repair: bool = True
    residual: bool = True
    damping: float = DAMPING
    prior: float = 0.0
    prior_density: float = 0.65
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuses what cannot be meant."""
        if self.criterion == "joint" and self.refit == "none":
            raise UsageError("the criterion joint chooses weights for their refit; set refit to model or layer")
        if not 0 < self.damping < float("inf"):
            raise UsageError(f"damping is {self.damping}; it is a positive share of the mean second moment")
        if self.prior < 0 or not 0 < self.prior_density < 1:
            raise UsageError(
                f"prior is {self.prior} and prior_density {self.prior_density}; needed are ≥ 0 and a share in (0, 1)"
            )
        if self.prior and self.criterion != "covariance":
            raise UsageError("the prior goes with the criterion covariance; set that too")

    @torch.no_grad()
    def __call__(self, model: Model, data: Data) -> Model:
        """The model with masked weights; the mask, or the reason for none, is in each layer's plan."""
        choices = self.choices(model)
        if not any(isinstance(choice, NM) for choice in choices.values()):
            shown = "; ".join(f"{name}: {reason}" for name, reason in list(choices.items())[:3])
            what = self.pattern or TWO_OF_FOUR
            raise PassError(f"no layer takes {what} ({shown or 'the model has no Linear and no Conv2d'})")
        plans: dict[str, LayerPlan] = {}
        due: dict[str, NM | None] = {}
        for name, choice in choices.items():
            with on_layer(name):
                plan = model.plan_of(name)
                if plan.mask is not None:  # an earlier mask pass was here
                    if choice == plan.pattern and self.pattern not in (None, choice):
                        raise PassError(f"it is masked at {choice} already; exclude it from {self.pattern}")
                elif isinstance(choice, str):
                    if plan.skipped != choice:
                        plans[name] = replace(plan, skipped=choice)
                else:
                    due[name] = choice
        if due and self.repair and self.sequential and self._target(data) == "model":
            reasons = {name: choice for name, choice in choices.items() if isinstance(choice, str)}
            due |= dict.fromkeys(repairable(model, due, reasons))
        for name, (mask, relative_error) in self.mask_layers(model, data, due).items():
            if due[name] is None:
                plans[name] = replace(plans.get(name, model.plan_of(name)), relative_error=relative_error)
            else:
                plans[name] = replace(
                    model.plan_of(name), pattern=due[name], mask=mask, relative_error=relative_error, skipped=None
                )
        return model.with_plan(plans)

    def _target(self, data: Data) -> Target:
        """What kept weights are fitted to."""
        return self.refit or ("model" if len(data.calibration) else "none")

    def mask_layers(
        self, model: Model, data: Data, due: Mapping[str, NM | None], dense: fx.GraphModule | None = None
    ) -> dict[str, tuple[Tensor, float | None]]:
        """Each layer's mask, which was applied, and the share of its outputs' power that it misses where that is known.

        A layer without a pattern keeps all its weights, and is fitted as the others are.
        Outputs are fitted to those of `dense`, which is the model as it is unless it is given. Raises PassError where
        images are needed and there are none.
        """
        criterion = self.criterion or ("joint" if len(data.calibration) and self.refit != "none" else "magnitude")
        target = self._target(data)
        if criterion == "magnitude" and target == "none":
            plain: dict[str, tuple[Tensor, float | None]] = {}
            for name, pattern in due.items():
                assert pattern is not None  # nothing is fitted here
                with on_layer(name):
                    plain[name] = (masked(model.layer(name), pattern), None)
            return plain
        if not due:
            return {}
        if not len(data.calibration):
            what = f"the criterion {criterion}" if criterion != "magnitude" else f"the refit to the {target}"
            raise PassError(f"{what} needs calibration images; give --data, or the criterion magnitude and no refit")
        found: dict[str, tuple[Tensor, float | None]] = {}
        finished = PartialResults(lambda: run_key(repr(self), model, due, data.calibration))

        def rewrite(site: TiedWeight, moments: SecondMoments | None) -> None:
            layers = [model.layer(name) for name in site.names]
            result = finished.get(site.names[0])
            if result is None:
                assert moments is not None  # collected wherever nothing was finished
                result = self._fitted(site, layers[0], due[site.names[0]], moments, criterion, target)
                finished.put(site.names[0], result)
            put(site, layers[0], result)
            for name, layer in zip(site.names, layers, strict=True):
                found[name] = (result["mask"].reshape(layer.weight.shape), float(result["relative_error"]))

        def share(site: TiedWeight, parts: Sequence[SecondMoments]) -> Tensor:
            return proven_share(parts, flat(model.layer(site.names[0]).weight), site.centred, self.damping)

        residual = share if self.residual and target == "model" else None
        known = finished.__contains__
        rewrite_in_order(model, data.calibration, list(due), rewrite, self.sequential, known, dense, residual)
        return found

    def _fitted(
        self,
        site: TiedWeight,
        layer: Layer,
        pattern: NM | None,
        moments: SecondMoments,
        criterion: Criterion,
        target: Target,
    ) -> dict[str, Tensor]:
        """The tensors to write into a layer: `mask`, `weight`, `relative_error`; `bias` if the mean output is free."""
        own = flat(layer.weight)
        centred = site.centred and target != "none"
        problem = moments.problem(centred)
        if target == "layer":
            problem = of_layer(problem, own, layer.bias if site.biased else None)
        if target == "none":
            best, fitted = own.double(), problem
        else:
            fitted = damped(problem, own, self.damping)
            best = unconstrained(fitted)
        if pattern is None:
            mask, weight = torch.ones_like(own, dtype=torch.bool), best
        else:
            mask = self._support(best, fitted, own, pattern, criterion)
            weight = torch.where(mask, own.double(), 0) if target == "none" else refit(fitted, mask)
        wanted = problem.power.sum()
        result = {
            "mask": unflat(mask, layer.weight.shape),
            "weight": unflat(weight, layer.weight.shape).to(layer.weight.dtype),
            "relative_error": problem.error(weight).sum() / wanted if wanted > 0 else torch.zeros(()),
        }
        if centred:
            result["bias"] = problem.bias(weight)
        return result

    def _support(
        self, best: Tensor, problem: LeastSquares, own: Tensor, pattern: NM, criterion: Criterion
    ) -> Bool[Tensor, "out columns"]:
        """The places that the criterion keeps."""
        if criterion == "magnitude":
            return nm_mask(own.abs(), pattern)
        power = problem.gram.diagonal(dim1=-2, dim2=-1).repeat_interleave(len(own) // len(problem.gram), 0)
        mask = nm_mask(best.square() * power, pattern)
        if criterion == "covariance":
            source = largest(own, self.prior_density) if self.prior else None
            return swapped(best, problem.gram, mask, pattern, self.prior, source)
        if criterion == "joint":
            return joint_support(best, problem.gram, lambda scaled: nm_mask(scaled.square(), pattern))
        return mask

    def choices(self, model: Model) -> dict[str, NM | str]:
        """For each layer that multiplies by weights the pattern that it takes, or why it stays dense."""
        budgeted = any(plan.pattern is not None and plan.mask is None for plan in model.plan.values())
        default = self.pattern or (None if budgeted else TWO_OF_FOUR)
        choices: dict[str, NM | str] = {}
        for name, reason in eligible(model, default or TWO_OF_FOUR, self.include, self.exclude).items():
            plan = model.plan_of(name)
            pattern = plan.pattern or default
            if pattern is None:
                choices[name] = plan.skipped or "no pattern was planned for it"
            else:
                choices[name] = reason or pattern
        return choices
