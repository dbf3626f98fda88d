"""Zero all but the N best weights of every M input channels.

For a score s ≥ 0 of the weight's shape, groups g of M consecutive input channels (per kernel tap) and blocks of
`rows` neighbouring output channels that share a pattern, the mask keeps in each group the N largest of

    S[block, g, m] = Σ over the rows of the block of s[row, g, m].

No other choice of N keeps a larger total score, since groups do not interact. With the criterion `magnitude`,
s = |W|: the kept sum of |W| is the largest possible (as in NVIDIA's ASP, where N:M is 2:4 and rows is 1).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mpcompile.data import Data
from mpcompile.errors import PassError, on_layer
from mpcompile.layers import eligible
from mpcompile.masks import grouped, ungrouped
from mpcompile.model import NM, Model
from mpcompile.pipeline import Effect


def nm_mask(score: Float[Tensor, "out in_ *taps"], pattern: NM) -> Bool[Tensor, "out in_ *taps"]:
    """True where a weight is kept: the `keep` highest scores of every `of`; of equal scores the first."""
    groups = grouped(score, pattern.of)
    shared = groups.reshape(-1, pattern.rows, *groups.shape[1:]).sum(1, dtype=torch.float64)
    # A stable sort, because topk does not say which of two equal scores it takes.
    best = shared.sort(dim=-1, descending=True, stable=True).indices[..., : pattern.keep]
    kept = torch.zeros_like(shared, dtype=torch.bool).scatter_(-1, best, True)
    return ungrouped(kept.repeat_interleave(pattern.rows, dim=0), score.shape)


def magnitude(weight: Float[Tensor, "out in_ *taps"]) -> Float[Tensor, "out in_ *taps"]:
    """|W|."""
    return weight.abs()


CRITERIA: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({"magnitude": magnitude})

TWO_OF_FOUR = NM(keep=2, of=4)


@dataclass(frozen=True, slots=True)
class NMMask:
    """Masks every layer for which a pattern is planned, and by `pattern` those for which none is.

    Without `pattern` the layers that a budget planned nothing for stay dense; where there was no budget, it is 2:4.
    Stems, output layers, depthwise convolutions and widths that M does not divide stay dense, each with its
    reason in the plan. `include` and `exclude` are shell patterns over qualified module names.
    """

    name: ClassVar[str] = "nm-mask"
    effect: ClassVar[Effect] = Effect.LOSSY
    requires: ClassVar[tuple[str, ...]] = ()

    pattern: NM | None = None
    criterion: Literal["magnitude"] = "magnitude"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @torch.no_grad()
    def __call__(self, model: Model, data: Data) -> Model:
        """The model with masked weights; the mask, or the reason for none, is in each layer's plan."""
        choices = self.choices(model)
        if not any(isinstance(choice, NM) for choice in choices.values()):
            shown = "; ".join(f"{name}: {reason}" for name, reason in list(choices.items())[:3])
            what = self.pattern or TWO_OF_FOUR
            raise PassError(f"no layer takes {what} ({shown or 'the model has no Linear and no Conv2d'})")
        plans = {}
        for name, choice in choices.items():
            with on_layer(name):
                plan = model.plan_of(name)
                if plan.mask is not None:  # an earlier mask pass was here
                    if choice == plan.pattern and self.pattern not in (None, choice):
                        raise PassError(f"it is masked at {choice} already; exclude it from {self.pattern}")
                elif isinstance(choice, str):
                    plans[name] = replace(plan, skipped=choice)
                else:
                    mask = masked(model.layer(name), choice, CRITERIA[self.criterion])
                    plans[name] = replace(plan, pattern=choice, mask=mask, skipped=None)
        return model.with_plan(plans)

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


def masked(layer: nn.Linear | nn.Conv2d, pattern: NM, score: Callable[[Tensor], Tensor]) -> Bool[Tensor, "..."]:
    """The mask that was applied to the layer's weight."""
    mask = nm_mask(score(layer.weight), pattern)
    # Not a product with the mask: that would leave −0.0, and NaN where a weight is infinite.
    layer.weight.masked_fill_(~mask, 0.0)
    return mask
