"""Scale migration: moves the spread of activation channels from a layer norm's output into the weights that read it.

An activation tensor has one scale for all channels, so a channel with large values costs the others their resolution;
a weight has one scale per output channel, and none per input channel. With a factor s_j > 0 and a shift m_j per
channel j,

    W x + b = (W diag(s)) x′ + (b + W m),    x′ = (x − m) / s,

and x′ costs no operation if x comes from a layer norm: γ′ = γ/s, β′ = (β − m)/s. Following SmoothQuant (Xiao et al.,
ICML 2023, arXiv 2211.10438, equation 4), s_j = max|x_j − m_j|^α / max_o|W_oj|^(1−α). The shift is the middle of the
channel's range, as in Outlier Suppression+ (Wei et al., EMNLP 2023, arXiv 2304.09145). For each layer norm, the pass
tries several α, with and without shift, and keeps the one with the least squared error of the quantised products on
calibration images; or none, if none lowers the error by 2 %.

Zeros of a weight stay zeros. The pass is exact, and comes before the lossy passes, so that the dense model that they
compare with has the same factors.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn

from mpcompile.analysis.eligibility import weight_nodes
from mpcompile.analysis.operator_sets import SHAPE_QUERY_NAMES
from mpcompile.data.images import Data, Split
from mpcompile.errors import PassError, UsageError, on_layer
from mpcompile.ir.batch import arguments
from mpcompile.ir.model import Model
from mpcompile.ir.quantization import ActivationType, Quantizer, fake_quantize, quantizers
from mpcompile.passes.dense_comparison import BATCH
from mpcompile.passes.quantize.policy import quantizable
from mpcompile.pipeline.pass_record import Effect

STRENGTHS = (0.25, 0.4, 0.5, 0.6, 0.75)  # α
ROWS = 2048  # tokens on which the error is measured
LEAST_GAIN = 0.02  # of the squared error; a smaller one may be chance
LARGEST_FACTOR = 100.0  # of s and 1/s: beyond it, float32 rounding of γ′ would show


@dataclass(frozen=True, slots=True)
class ScaledNorm:
    """A layer norm with learned γ and β, and the Linear layers that read its output; nothing else reads it."""

    node: fx.Node
    weight: nn.Parameter
    bias: nn.Parameter
    readers: tuple[nn.Linear, ...]

    def matrix(self) -> Float[Tensor, "out channels"]:
        """The weights of all readers, one below the other."""
        return torch.cat([reader.weight.detach() for reader in self.readers])

    def rescale(self, factor: Float[Tensor, " channels"], shift: Float[Tensor, " channels"]) -> None:
        """Divides the output by `factor` after subtracting `shift`, in place; the readers compute what they did."""
        for reader in self.readers:
            if reader.bias is not None:
                reader.bias.add_(reader.weight @ shift)
            reader.weight.mul_(factor)
        self.bias.copy_((self.bias - shift) / factor)
        self.weight.div_(factor)


@dataclass(frozen=True, slots=True)
class ScaleMigration:
    """Divides the outputs of layer norms by a factor per channel, and multiplies the weights that read them by it.

    Args:
        activations: the stored type of the activations that `quantize` will use.
        include: as in `quantize`.
        exclude: as in `quantize`; layer norms that an excluded layer reads keep their scale.
    """

    name: ClassVar[str] = "scale-migration"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[str, ...]] = ()

    activations: ActivationType = "u8"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def require_inputs(self, model: Model, data: Data) -> None:
        """Raises PassError if there are no calibration images."""
        if not len(data.calibration):
            raise PassError("the spread of activations is measured on calibration images; give --data")

    @torch.no_grad()
    def __call__(self, model: Model, data: Data) -> Model:
        """The model with rescaled layer norms.

        Raises PassError if there are no calibration images or an activation is not finite, UsageError if a lossy pass
        came before.
        """
        self.require_inputs(model, data)
        if quantizers(model.graph):
            raise UsageError("scale-migration comes after quantize; put it before, so that quantize sees its factors")
        if model.dense is not None:
            raise UsageError(
                "scale-migration comes after a lossy pass; put it before, so that the dense model has the same factors"
            )
        reasons = quantizable(model, self.include, self.exclude)
        norms = list(scaled_norms(model, {name for name, reason in reasons.items() if reason is None}))
        rows = _rows(model.graph, norms, data.calibration)
        gains = []
        for norm, x in zip(norms, rows, strict=True):
            with on_layer(norm.node.name):
                found = best_factor(x, norm.matrix(), self.activations, all(r.bias is not None for r in norm.readers))
            if found is not None:
                factor, shift, gain = found
                norm.rescale(factor, shift)
                gains.append(gain)
        note = f"scales migrated at {len(gains)} of {len(norms)} layer norms"
        if gains:
            mean = sum(gains) / len(gains)
            note += f", which lowers the squared error of their quantised products by {100 * mean:.0f} % on average"
        return replace(model, notes=(*model.notes, note))


def scaled_norms(model: Model, quantised: set[str]) -> Iterator[ScaledNorm]:
    """The layer norms of a graph whose output only Linear layers in `quantised` read.

    No other node may use the parameters of the norm or of these layers.
    """
    modules, uses = dict(model.graph.named_modules()), _uses(model.graph)
    nodes_of, _ = weight_nodes(model.graph)
    single = {
        nodes[0]: model.layer(name)
        for name, nodes in nodes_of.items()
        if name in quantised and len(nodes) == 1 and nodes[0].op == "call_module" and nodes[0].target == name
    }
    for node in model.graph.graph.nodes:
        parameters = _affine(model, modules, node)
        users = [user for user in node.users if not _reads_shape(user)]
        if parameters is None or not users or not all(user in single for user in users):
            continue
        layers = [single[user] for user in users]
        linear = tuple(layer for layer in layers if isinstance(layer, nn.Linear))
        changed = [*parameters, *(parameter for layer in linear for parameter in layer.parameters())]
        if len(linear) == len(layers) and all(uses[id(parameter)] == 1 for parameter in changed):
            yield ScaledNorm(node, *parameters, linear)


def _uses(graph: fx.GraphModule) -> Counter[int]:
    """How many nodes compute with each parameter, by the parameter's id."""
    uses = Counter[int]()
    for node in graph.graph.nodes:
        if node.op == "call_module":
            uses.update(id(parameter) for parameter in graph.get_submodule(str(node.target)).parameters())
        elif node.op == "get_attr":
            uses[id(_attribute(graph, str(node.target)))] += len(node.users)
    return uses


def _reads_shape(node: fx.Node) -> bool:
    """Whether a node reads only the shape or type of its input."""
    if node.op == "call_method":
        return node.target in SHAPE_QUERY_NAMES
    return node.target is getattr and node.args[1] in ("shape", "dtype", "device", "ndim")


def _affine(model: Model, modules: dict[str, nn.Module], node: fx.Node) -> tuple[nn.Parameter, nn.Parameter] | None:
    """γ and β of a layer norm over one axis; None for any other node."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        if not isinstance(module, nn.LayerNorm) or len(module.normalized_shape) != 1:
            return None
        found: list[object] = [module.weight, module.bias]
    elif node.target is nn.functional.layer_norm:
        named = dict(zip(("input", "normalized_shape", "weight", "bias"), node.args, strict=False)) | dict(node.kwargs)
        shape = named["normalized_shape"]
        if not isinstance(shape, tuple | list) or len(shape) != 1:
            return None
        fetched = [f for f in (named.get("weight"), named.get("bias")) if isinstance(f, fx.Node) and f.op == "get_attr"]
        found = [_attribute(model.graph, str(f.target)) for f in fetched]
    else:
        return None
    parameters = [value for value in found if isinstance(value, nn.Parameter)]
    return (parameters[0], parameters[1]) if len(parameters) == 2 else None


def _attribute(graph: fx.GraphModule, path: str) -> object:
    owner, _, name = path.rpartition(".")
    return getattr(graph.get_submodule(owner), name, None)


def _rows(graph: fx.GraphModule, norms: Sequence[ScaledNorm], images: Split) -> list[Float[Tensor, "rows channels"]]:
    """About ROWS of the output rows of each norm, at equal distances, over all images."""
    found: dict[fx.Node, list[Tensor]] = {norm.node: [] for norm in norms}
    batches = -(-len(images) // BATCH)

    class Observed(fx.Interpreter):
        """Keeps rows of the norms' outputs."""

        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if n in found:
                rows = value.reshape(-1, value.shape[-1])
                found[n].append(rows[:: max(1, batches * len(rows) // ROWS)].clone())
            return value

    if norms:
        dtype = norms[0].weight.dtype
        for inputs, _ in images.announced(BATCH):
            Observed(graph).run(*arguments(inputs, dtype))
    return [torch.cat(found[norm.node]) for norm in norms]


def best_factor(
    x: Float[Tensor, "rows channels"], weight: Float[Tensor, "out channels"], kind: ActivationType, shiftable: bool
) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"], float] | None:
    """The factor and shift per channel with the least error of the quantised product, and the share of it removed.

    None if that share is less than LEAST_GAIN.
    """
    expected = x @ weight.T
    low, high = x.amin(0), x.amax(0)
    middle = (low + high) / 2
    before = _error(x, weight, expected, kind)
    best, least = None, before * (1 - LEAST_GAIN)
    for shift in (torch.zeros_like(middle), middle) if shiftable and kind == "u8" else (torch.zeros_like(middle),):
        spread = (x - shift).abs().amax(0).clamp_min(1e-5)
        reach = weight.abs().amax(0).clamp_min(1e-5)
        for strength in (0.0, *STRENGTHS) if bool(shift.any()) else STRENGTHS:
            factor = spread**strength / reach ** (1 - strength) if strength else torch.ones_like(spread)
            factor = (factor / factor.log().mean().exp()).clamp(1 / LARGEST_FACTOR, LARGEST_FACTOR)
            error = _error((x - shift) / factor, weight * factor, expected - weight @ shift, kind)
            if error < least:
                best, least = (factor, shift), error
    return None if best is None else (*best, 1 - least / before)


def _error(x: Tensor, weight: Tensor, expected: Tensor, kind: ActivationType) -> float:
    """The squared error of the product with x and weight quantised by min-max."""
    quantizer = Quantizer(kind)
    quantizer.set_range(float(x.min()), float(x.max()))
    scale = (weight.abs().amax(1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    rounded = (weight / scale).round() * scale
    found = fake_quantize(x, quantizer.scale.to(x.dtype), quantizer.zero_point) @ rounded.T
    return float((found - expected).square().sum())
