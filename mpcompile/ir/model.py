"""The values that flow: NM, Spectrum, LayerPlan, Source and Model."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, fx, nn

from mpcompile.ir.pattern import NM
from mpcompile.ir.results import Certificate, Epoch, Spectrum


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What was decided for one layer. Each field has one writer; a later pass may read it."""

    spectrum: Spectrum | None = None  # the budget
    unfitted: str | None = None  # the budget; why the layer has no spectrum, as a sentence
    pattern: NM | None = None  # the budget, or else the mask pass
    permutation: Int[Tensor, " in_"] | None = None  # the permutation; place i holds the channel permutation[i] had
    unpermuted: str | None = None  # the permutation; why the input channels kept their order, as a sentence
    mask: Bool[Tensor, "..."] | None = None  # the mask pass; shaped like the weight, True where kept
    relative_error: float | None = None  # the mask pass; E‖y − W′x‖² / E‖y‖² on calibration images, y the refit target
    skipped: str | None = None  # why the layer stays dense, as a sentence


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model came from, and what its input looks like.

    `arch` is a timm name or `pkg.mod:factory`, or the name of the class where the module itself was given. `size` is
    (channels, height, width); `mean` and `std` are per channel, of pixels in [0, 1].
    """

    name: str
    sha256: str
    arch: str
    size: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"
    labels: tuple[str, ...] = ()
    arch_args: Mapping[str, Any] | None = None  # what `arch` was built with; None where it cannot be built again


@dataclass(frozen=True, slots=True)
class Model:
    """A captured model and the plan for its layers, keyed by qualified module name.

    The plan is not in `node.meta`, which is lost on re-trace, export and pickling. The graph is the one mutable
    thing here; a run of passes owns a copy of it.
    """

    graph: fx.GraphModule
    example: Tensor
    source: Source
    plan: Mapping[str, LayerPlan] = field(default_factory=lambda: MappingProxyType({}))
    dense: fx.GraphModule | None = None  # the graph before the first lossy pass; None where nothing was lost yet
    certificate: Certificate | None = None  # what was proven last; of this graph
    epochs: tuple[Epoch, ...] = ()  # of all training that it had here

    def layers(self) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
        """Each Linear and Conv2d with its qualified name, in the order of definition."""
        for name, module in self.graph.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                yield name, module

    def layer(self, name: str) -> nn.Linear | nn.Conv2d:
        """The Linear or Conv2d of that qualified name."""
        module = self.graph.get_submodule(name)
        if not isinstance(module, nn.Linear | nn.Conv2d):
            raise TypeError(f"{name} is a {type(module).__name__}, not a Linear or Conv2d")
        return module

    def plan_of(self, name: str) -> LayerPlan:
        """The plan for a layer: an empty one where none was written."""
        return self.plan.get(name, LayerPlan())

    def patterns(self) -> dict[str, NM]:
        """The patterns of the masked layers."""
        return {n: plan.pattern for n, plan in self.plan.items() if plan.mask is not None and plan.pattern is not None}

    def masks(self) -> dict[str, Tensor]:
        """The masks of the masked layers."""
        return {name: plan.mask for name, plan in self.plan.items() if plan.mask is not None}

    def with_plan(self, plans: Mapping[str, LayerPlan]) -> "Model":
        """The same graph with these layers' plans replaced."""
        return replace(self, plan=MappingProxyType({**self.plan, **plans}))

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """The outputs for a batch."""
        result: Tensor = self.graph(x)
        return result
