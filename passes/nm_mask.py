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
    """Masks every eligible layer by its planned pattern, or by `pattern` where none was planned.

    Stems, output layers, depthwise convolutions and widths that M does not divide stay dense, each with its
    reason in the plan. `include` and `exclude` are shell patterns over qualified module names.
    """

    name: ClassVar[str] = "nm-mask"
    effect: ClassVar[Effect] = Effect.LOSSY
    requires: ClassVar[tuple[str, ...]] = ()

    pattern: NM = TWO_OF_FOUR
    criterion: Literal["magnitude"] = "magnitude"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @torch.no_grad()
    def __call__(self, model: Model, data: Data) -> Model:
        """The model with masked weights; the mask, or the reason for none, is in each layer's plan."""
        verdicts = eligible(model, self.pattern, self.include, self.exclude)
        if all(verdicts.values()):
            shown = "; ".join(f"{name}: {reason}" for name, reason in list(verdicts.items())[:3])
            raise PassError(f"no layer takes {self.pattern} ({shown or 'the model has no Linear and no Conv2d'})")
        plans = {}
        for name, reason in verdicts.items():
            with on_layer(name):
                plan = model.plan_of(name)
                if plan.mask is not None:  # an earlier mask pass was here
                    if not reason and plan.pattern != self.pattern:
                        raise PassError(f"it is masked at {plan.pattern} already; exclude it from {self.pattern}")
                elif reason:
                    plans[name] = replace(plan, skipped=reason)
                else:
                    pattern = plan.pattern or self.pattern
                    mask = masked(model.layer(name), pattern, CRITERIA[self.criterion])
                    plans[name] = replace(plan, pattern=pattern, mask=mask, skipped=None)
        return model.with_plan(plans)


def masked(layer: nn.Linear | nn.Conv2d, pattern: NM, score: Callable[[Tensor], Tensor]) -> Bool[Tensor, "..."]:
    """The mask that was applied to the layer's weight."""
    mask = nm_mask(score(layer.weight), pattern)
    # Not a product with the mask: that would leave −0.0, and NaN where a weight is infinite.
    layer.weight.masked_fill_(~mask, 0.0)
    return mask
