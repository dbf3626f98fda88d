"""Batch normalisation after pruning: statistics that give each channel the mean and variance it had.

Weights that were removed or changed give a channel another mean m and variance v, and the stored statistics μ and σ²
no longer standardise it. Re-estimating them by what the images show is right only where the images are like those that
the model was trained on; where they are not, it changes the dense model, too. So the statistics are moved by as much as
the channel moved. With m, v of the dense model and m′, v′ of the pruned one on the same images, s² = σ² + ε:

    s′ = s √(v′/v),    μ′ = m′ − (m − μ) s′/s,

which makes the normalised channel's mean and variance what they were, and is plain re-estimation where m = μ and
v = σ². Each normalisation sees what those before it now give.
"""

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mpcompile.data.images import Data, Split
from mpcompile.errors import PassError
from mpcompile.ir.model import Model
from mpcompile.passes.dense_comparison import outputs_of
from mpcompile.pipeline.pass_manager import Effect

SMALLEST = 1e-12  # variance below which a channel counts as constant, and only its mean is moved


@dataclass(frozen=True, slots=True)
class BatchNorm:
    """Moves batch statistics by as much as pruning moved their channels, where that brings the logits nearer.

    Measured as the mean squared distance from the dense model's logits on the validation images; where those are not
    nearer than before, or no layer is normalised, nothing is changed.
    """

    name: ClassVar[str] = "batch-norm"
    effect: ClassVar[Effect] = Effect.LOSSY
    requires: ClassVar[tuple[str, ...]] = ()

    @torch.no_grad()
    def __call__(self, model: Model, data: Data) -> Model:
        """The model with new statistics, or as it was."""
        if model.dense is None or not any(_normalised(model.graph)):
            return model
        if not len(data.calibration):
            raise PassError("batch statistics are measured on calibration images; give --data")
        moved = copy.deepcopy(model.graph)
        match_statistics(model.dense, moved, data.calibration)
        check = data.validation if len(data.validation) else data.calibration
        wanted = outputs_of(model.dense, check)
        if distance(outputs_of(moved, check), wanted) < distance(outputs_of(model.graph, check), wanted):
            return replace(model, graph=moved)
        return model


def distance(found: Tensor, wanted: Tensor) -> float:
    """The mean squared difference; infinite where something is not a number."""
    value = float((found.double() - wanted.double()).square().mean())
    return value if value == value else float("inf")


def match_statistics(dense: fx.GraphModule, graph: fx.GraphModule, images: Split) -> None:
    """Moves the statistics of `graph` in place; all images go through it as one batch."""
    pixels = images.first(len(images))
    before: dict[str, tuple[Tensor, Tensor]] = {}

    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        axes = [axis for axis in range(x.ndim) if axis != 1]
        return x.double().mean(axes), x.double().var(axes, unbiased=False)

    def record(name: str) -> object:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            before[name] = moments(args[0])

        return hook

    def move(name: str) -> object:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            assert isinstance(module, _BatchNorm)
            assert module.running_mean is not None
            assert module.running_var is not None
            (m, v), (m_now, v_now) = before[name], moments(args[0])
            scale = (module.running_var.double() + module.eps).sqrt()
            ratio = torch.where((v > SMALLEST) & (v_now > SMALLEST), (v_now / v).sqrt(), 1.0)
            mean = m_now - (m - module.running_mean.double()) * ratio
            module.running_var.copy_(((scale * ratio).square() - module.eps).clamp_min(0))
            module.running_mean.copy_(mean)

        return hook

    for side, hooked in ((dense, record), (graph, move)):
        handles = [m.register_forward_pre_hook(hooked(n)) for n, m in _normalised(side)]  # type: ignore[arg-type]
        try:
            side(pixels.to(next(side.parameters()).dtype))
        finally:
            for handle in handles:
                handle.remove()


def _normalised(graph: fx.GraphModule) -> list[tuple[str, _BatchNorm]]:
    """The batch normalisations that have statistics."""
    found = [(name, module) for name, module in graph.named_modules() if isinstance(module, _BatchNorm)]
    return [(name, module) for name, module in found if module.running_mean is not None]
