"""The values that flow: NM, Spectrum, LayerPlan, Source and Model."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, fx, nn

from mpcompile.errors import UsageError

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema

WIDEST_GROUP = 64


@dataclass(frozen=True, slots=True)
class NM:
    """N kept of every M consecutive input channels (NVIDIA's sense; some other tools count the zeros).

    `rows` > 1: that many neighbouring output channels share one pattern. Such a mask is still legal N:M, gives
    a CPU kernel more to reuse, and costs more accuracy. Dense is `None`, never an NM.
    """

    keep: int
    of: int
    rows: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.keep < self.of <= WIDEST_GROUP:
            raise UsageError(
                f"pattern {self.keep}:{self.of}: needs 1 ≤ N < M ≤ {WIDEST_GROUP} (N weights kept of every M); "
                "for a dense layer leave it out with --exclude"
            )
        if self.rows < 1:
            raise UsageError(f"pattern {self}: the number of rows that share a pattern is at least 1")

    @classmethod
    def parse(cls, text: str) -> "NM":
        """The pattern that `2:4` or, with four rows sharing, `2:4x4` spells."""
        match = re.fullmatch(r"\s*(\d{1,9})\s*:\s*(\d{1,9})\s*(?:x\s*(\d{1,9}))?\s*", text)
        if match is None:
            raise UsageError(
                f"pattern {text!r} is not N:M (N weights kept of every M), such as 2:4; 2:4x4 makes four "
                "neighbouring output channels share one pattern"
            )
        keep, of, rows = match.groups(default="1")
        return cls(int(keep), int(of), int(rows))

    @property
    def density(self) -> float:
        """The share of weights kept, in (0, 1)."""
        return self.keep / self.of

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}" + (f"x{self.rows}" if self.rows > 1 else "")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: "GetCoreSchemaHandler") -> "CoreSchema":
        """In recipes an NM is written as text."""
        from pydantic_core import core_schema

        def validate(value: object) -> NM:
            if isinstance(value, NM):
                return value
            try:
                return NM.parse(str(value))
            except UsageError as error:
                raise ValueError(str(error)) from error

        return core_schema.no_info_before_validator_function(
            lambda value: str(validate(value)),
            core_schema.no_info_after_validator_function(validate, core_schema.str_schema(pattern=r"^\d+:\d+(x\d+)?$")),
            serialization=core_schema.to_string_ser_schema(),
        )


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The Marchenko–Pastur fit of one layer, in short; floats only, so that it prints and serialises.

    `q` is the aspect ratio, `sigma` the fitted deviation of an entry, `edge` the singular value T₊ that noise passes
    with 5 % probability, `spikes` how many pass it, `bulk_share` the share of the spectrum inside the fitted bulk.
    The errors are largest distances between distribution functions over the middle half of the spectrum: of the
    layer, and of its own entries shuffled (None where that was not computed). mpcompile.spectrum has the mathematics.
    """

    q: float
    sigma: float
    edge: float
    spikes: int
    bulk_share: float
    fit_error: float
    null_error: float | None


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What was decided for one layer. Each field has one writer; a later pass may read it."""

    spectrum: Spectrum | None = None  # the budget
    unfitted: str | None = None  # the budget; why the layer has no spectrum, as a sentence
    pattern: NM | None = None  # the budget, or else the mask pass
    permutation: Int[Tensor, " in_"] | None = None  # the permutation; place i holds the channel permutation[i] had
    unpermuted: str | None = None  # the permutation; why the input channels kept their order, as a sentence
    mask: Bool[Tensor, "..."] | None = None  # the mask pass; shaped like the weight, True where kept
    missed: float | None = None  # the mask pass; E‖y − W′x‖² / E‖y‖² on calibration images, y what it is fitted to
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
class LayerCertificate:
    """What one layer's change R = A − S does, A being its dense weights and S those it has now.

    `reach` is the mean over images of ‖Rψ‖∞, the largest change of any of its outputs on the inputs ψ that it now gets;
    `share` its part of the logits' shift, to first order. `critical` is the largest amplification L of ‖Rψ‖∞ to the
    logits at which the paper's theorem still certifies the change, given the penalties that the model was trained with;
    None where those are not known. passes/certify.py has the statements.
    """

    name: str
    reach: float
    reach_max: float
    share: float
    critical: float | None


@dataclass(frozen=True, slots=True)
class Certificate:
    """What is proven of the compressed model on images that no pass has seen, and what follows for others."""

    images: int
    agreeing: int  # images with the dense model's answer
    proven: int  # images whose margin exceeds twice their logit shift
    agreement_bound: float  # Clopper–Pearson, one-sided, at `confidence`
    confidence: float
    shift_mean: float  # of max |Δ logit|
    shift_max: float
    margin_median: float  # of the dense model: largest logit less the second
    explained: float  # the sum of the layers' shares: 1 where the first order is all there is
    layers: tuple[LayerCertificate, ...]


@dataclass(frozen=True, slots=True)
class Epoch:
    """One epoch of training. Losses are means over its steps; spectra are those of the masked layers at its end."""

    steps: int
    loss: float
    labels_loss: float | None  # cross-entropy; None where the images have no labels
    teacher_loss: float  # τ² KL to the dense model
    rate: float  # learning rate of the last step
    edge: float | None  # mean of σ₊ over the masked layers; None where none can be fitted
    spikes: int | None  # singular values past the noise edge T₊, all masked layers together


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
