"""How close a graph's outputs are to the dense model's on validation images."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from mpcompile.data.images import Split
from mpcompile.ir.head import Head
from mpcompile.ir.results import Closeness
from mpcompile.measure.confidence import as_logits, common_factor
from mpcompile.passes.dense_comparison import outputs_of

SMALLEST_VARIANCE = 1e-12  # of outputs that are values


@dataclass(frozen=True)
class Judge:
    """Compares graphs with the dense outputs on the same images.

    Attributes:
        images: the validation images.
        dense: the dense model's outputs for them, (images, outputs, …).
        head: the decision rule of the outputs.
    """

    images: Split
    dense: Tensor
    head: Head

    def on_first(self, count: int) -> "Judge":
        """The same comparison on the first `count` images."""
        return replace(self, images=replace(self.images, order=self.images.order[:count]), dense=self.dense[:count])

    @torch.no_grad()
    def of(self, graph: fx.GraphModule) -> Closeness:
        """The divergence with the best common factor on the logits, and the agreement.

        For outputs that are values, the squared error relative to the variance of the dense values, and no agreement.
        """
        now = outputs_of(graph, self.images)
        if not bool(now.isfinite().all()):
            return Closeness(float("inf"), None, 0.0 if self.head.decides else None)
        if not self.head.decides:
            theirs = self.dense.double()
            variance = float((theirs - theirs.mean()).square().mean())
            error = float((now.double() - theirs).square().mean())
            return Closeness(error / max(variance, SMALLEST_VARIANCE), None, None)
        (before, rule), (after, _) = as_logits(self.dense, self.head), as_logits(now, self.head)
        found = common_factor(before, after, rule)
        assert found is not None
        agreement = float(self.head.same(self.dense, now).double().mean())
        return Closeness(found.divergence, found.factor, agreement)
