"""The values that flow through passes: LayerPlan, Source and Model."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, fx, nn

from mpcompile.ir.batch import Tensors, all_outputs, arguments, primary
from mpcompile.ir.head import Head
from mpcompile.ir.output_tree import ONE, rebuilt
from mpcompile.ir.pattern import NM
from mpcompile.ir.results import Certificate, Epoch, Polished, Spectrum
from mpcompile.ir.source import Source

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """The decisions about one layer. The pass that a field's comment names writes it; every later pass may read it."""

    spectrum: Spectrum | None = None  # mp-budget
    unfitted: str | None = None  # mp-budget; why no spectrum could be fitted, as a sentence
    pattern: NM | None = None  # mp-budget, or nm-mask if there was no budget
    permutation: Int[Tensor, " in_"] | None = None  # permute; position i holds the former channel permutation[i]
    unpermuted: str | None = None  # permute; why the input channels kept their order, as a sentence
    mask: Bool[Tensor, "..."] | None = None  # nm-mask; shaped like the weight, True where kept
    relative_error: float | None = None  # nm-mask; E‖y − W′x‖² / E‖y‖² on calibration images, y the refit target
    skipped: str | None = None  # why the layer stays dense, as a sentence
    logit_factor: float | None = None  # confidence; the factor on the logits that is in the layer's weight and bias
    scale: Float[Tensor, " out"] | None = None  # quantize; the weight of output channel o is scale[o] × integers
    rounding_error: float | None = None  # quantize; relative_error of the rounded weight
    unquantized: str | None = None  # quantize; why the layer stays in floating point, as a sentence


@dataclass(frozen=True, slots=True)
class Model:
    """A captured model and the plan for its layers, keyed by qualified module name.

    `example` is a batch (b, c, h, w) on which passes and checks run the graph. The graph takes the images and then the
    other inputs, and returns one tensor, or a tuple that begins with the primary output (mpcompile/ir/batch.py). The
    plan is not stored in `node.meta`, which is lost on re-trace, export and pickling. Only the graph is mutable; the
    pass manager works on a copy of it.
    """

    graph: fx.GraphModule
    example: Tensor
    source: Source
    plan: Mapping[str, LayerPlan] = field(default_factory=lambda: MappingProxyType({}))
    dense: fx.GraphModule | None = None  # the graph before the first lossy pass; None before that
    certificate: Certificate | None = None  # of this graph; None if not certified, or changed since
    epochs: tuple[Epoch, ...] = ()  # every distillation epoch so far
    polished: Polished | None = None  # of the last pass polish
    notes: tuple[str, ...] = ()  # of the pass that returned this model, for its row in the report
    head: Head | None = None  # how outputs become decisions; None: by the number of outputs (`head_for`)
    others: tuple[Tensor, ...] = ()  # examples of the inputs after the images
    input_names: tuple[str, ...] = ("images",)
    output_names: tuple[str, ...] = ("logits",)  # in the order of the graph, the primary output first
    captured_by: str = "recorder"  # or "export"
    around: tuple[bool, bool] = (False, False)  # whether a larger model has layers before and after this part of it
    output_tree: Any = ONE  # what the module returns, with a Slot in place of each tensor

    def layers(self) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
        """Each Linear and Conv2d with its qualified name, in the order of module definition."""
        for name, module in self.graph.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                yield name, module

    def layer(self, name: str) -> nn.Linear | nn.Conv2d:
        """The Linear or Conv2d with this qualified name. Raises TypeError for any other module."""
        module = self.graph.get_submodule(name)
        if not isinstance(module, nn.Linear | nn.Conv2d):
            raise TypeError(f"{name} is a {type(module).__name__}, not a Linear or Conv2d")
        return module

    def plan_of(self, name: str) -> LayerPlan:
        """The plan of a layer; an empty LayerPlan if none was written."""
        return self.plan.get(name, LayerPlan())

    def patterns(self) -> dict[str, NM]:
        """The pattern of each masked layer, by layer name; layers with an unstructured mask are left out."""
        return {n: plan.pattern for n, plan in self.plan.items() if plan.mask is not None and plan.pattern is not None}

    def scales(self) -> dict[str, Tensor]:
        """The weight scale of each quantised layer, by layer name, one number for each output channel."""
        return {name: plan.scale for name, plan in self.plan.items() if plan.scale is not None}

    def masks(self) -> dict[str, Tensor]:
        """The mask of each masked layer, by layer name; shaped like the weight, True where kept."""
        return {name: plan.mask for name, plan in self.plan.items() if plan.mask is not None}

    def with_plan(self, plans: Mapping[str, LayerPlan]) -> "Model":
        """A model with the same graph and the plans of these layers replaced."""
        return replace(self, plan=MappingProxyType({**self.plan, **plans}))

    @property
    def trained(self) -> bool:
        """Whether a training changed weights after masking."""
        return bool(self.epochs) or (self.polished is not None and self.polished.kept_start is None)

    @property
    def example_inputs(self) -> tuple[Tensor, ...]:
        """The example of every input, the images first."""
        return (self.example, *self.others)

    @torch.no_grad()
    def __call__(self, x: Tensors) -> Tensor:
        """The primary output (b, …), usually logits, for images (b, c, h, w) or all inputs. Computes no gradients."""
        return primary(self.graph(*arguments(x)))

    @torch.no_grad()
    def outputs(self, x: Tensors) -> tuple[Tensor, ...]:
        """All outputs in the order of `output_names`, the primary one first. Computes no gradients."""
        return all_outputs(self.graph(*arguments(x)))

    def as_returned(self, x: Tensors) -> Any:
        """The outputs in the form that the original module returns them: a tensor, a dict, a ModelOutput, …"""
        return rebuilt(self.output_tree, self.outputs(x))
