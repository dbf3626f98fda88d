"""Captures an nn.Module as a Model: a torch.fx trace, checked to compute the same outputs.

A deep copy is traced once: tracing can leave proxies in a model's caches (timm's LeViT caches its attention biases),
and a second trace of the same instance would bake them in. The image is the only placeholder; optional arguments of
`forward` take their defaults. nn.MultiheadAttention is decomposed (mpcompile/frontend/multihead_attention.py). A
CaptureError names the line of model code that cannot be traced.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpcompile.errors import CaptureError
from mpcompile.frontend.conv1d import as_two_dimensional
from mpcompile.frontend.multihead_attention import decompose_attention
from mpcompile.frontend.plain_copy import copied, plain_copy, wrapped
from mpcompile.frontend.preprocessing import source_of
from mpcompile.frontend.trace_errors import copy_refusal, trace_refusal
from mpcompile.ir.model import Model, Source
from mpcompile.ir.parity import relative_difference
from mpcompile.ir.shapes import run_example

log = logging.getLogger(__name__)

# While it traces, torch.fx replaces nn.Module.__call__ in the whole process. ImageTracer lets modules of other threads
# through, but a second trace would restore the first one's replacement at its end.
TRACING = threading.Lock()
# Largest relative difference: the graph runs the same operators on the same values; only a fused kernel that tracing
# decomposed can round differently.
CAPTURE_DRIFT = 1e-5


class ImageTracer(fx.Tracer):
    """Traces forward(image) with the leaf modules and wrapped functions that timm registers."""

    def __init__(self, leaves: Sequence[str] = ()) -> None:
        from timm.models import get_notrace_functions, get_notrace_modules

        functions = [function for function in get_notrace_functions() if callable(function)]
        super().__init__(autowrap_functions=tuple(functions))
        self._leaf_types: tuple[type[nn.Module], ...] = tuple(get_notrace_modules())
        self._leaf_names = frozenset(leaves)
        self._thread = threading.get_ident()
        self.decided_by: fx.Node | None = None  # the node whose truth, length or items Python code asked for

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Refuses the truth of a traced value, as torch.fx does, and notes its node."""
        self.decided_by = obj.node
        return super().to_bool(obj)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Iterates over a traced value where torch.fx can, and notes its node."""
        self.decided_by = obj.node
        found: Iterator[Any] = super().iter(obj)
        self.decided_by = None
        return found

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Records a call of the traced module as a node; runs a module of another thread directly."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Records a parameter that the traced module reads; returns one of another thread directly."""
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module stays whole: torch's own, timm's untraceable ones, and those that the user named."""
        return (
            isinstance(m, self._leaf_types)
            or module_qualified_name in self._leaf_names
            or super().is_leaf_module(m, module_qualified_name)
        )

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: object = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """The module and one placeholder, the image; other arguments keep their defaults."""
        return root_fn, [self.root, self.create_proxy("placeholder", "x", (), {})]


def _computing_type(module: nn.Module) -> torch.dtype:
    """The type to capture in: float64 for a float64 module, else float32 (half precision is too coarse to compare)."""
    own = next((p.dtype for p in module.parameters() if p.dtype.is_floating_point), torch.float32)
    return torch.float64 if own == torch.float64 else torch.float32


def noise(size: Sequence[int], batch: int = 2, seed: int = 0) -> Tensor:
    """Standard normal noise (batch, *size), determined by the seed."""
    return torch.randn(batch, *size, generator=torch.Generator().manual_seed(seed))


def capture(
    module: nn.Module, source: Source | None = None, example: Tensor | None = None, leaves: Sequence[str] = ()
) -> Model:
    """Captures a module as a Model. The graph must give the module's outputs on the example and on another batch size.

    Args:
        module: the model; it is not changed. A half-precision module is captured in float32.
        source: its name and preprocessing; by default its class name and the preprocessing of its `pretrained_cfg`,
            or ImageNet's.
        example: a batch (b, c, h, w); by default noise of the source's size.
        leaves: qualified names of modules to keep whole.

    Raises CaptureError if the module cannot be traced, does not return one finite tensor (b, …), or its graph computes
    something else.

    Other threads may run modules meanwhile, except modules made by torch.compile, which refuse to run during a trace.
    Concurrent captures run one after the other.
    """
    with TRACING:
        return _captured(module, source, example, leaves)


def _captured(module: nn.Module, source: Source | None, example: Tensor | None, leaves: Sequence[str]) -> Model:
    """`capture`, while TRACING is held."""
    while (inner := wrapped(module)) is not None:
        module = inner
    kind = type(module).__name__
    source = source or source_of(module, name=kind, arch=kind, sha256="")
    dtype = _computing_type(module)
    example = (noise(source.size) if example is None else example).to(dtype)
    try:
        reference = copied(module).eval().to(dtype)
        traced, notes = plain_copy(reference)
    except Exception as error:
        raise CaptureError(copy_refusal(module, error)) from error
    _require_modules(traced, leaves)
    for note in notes:
        log.warning("%s: %s", kind, note)
    expected = _run_original(reference, example)
    _require_repeatable(reference, example, expected)
    tracer = ImageTracer(leaves)
    try:
        graph = tracer.trace(traced)
        graph_module = fx.GraphModule(traced, graph, type(module).__name__)
    except Exception as error:
        graph_so_far = getattr(tracer, "graph", None)
        raise CaptureError(trace_refusal(traced, graph_so_far, tracer.decided_by, error)) from error
    _keep_layer_modules(graph_module, traced)
    decompose_attention(graph_module)
    as_two_dimensional(graph_module)
    model = Model(graph=graph_module.eval(), example=example, source=source)
    _check_same(model, reference, expected)
    return model


def _require_modules(module: nn.Module, names: Sequence[str]) -> None:
    """Raises CaptureError if a name is not a module of the model."""
    known = dict(module.named_modules())
    for name in names:
        if name not in known:
            listed = [child for child, _ in module.named_children()]
            shown = ", ".join(listed[:4]) + (", …" if len(listed) > 4 else "")
            raise CaptureError(f"--leaf {name!r} is not a module of {type(module).__name__}; it has {shown or 'none'}")


def _run_original(module: nn.Module, example: Tensor) -> Tensor:
    """The module's outputs (b, …). Raises CaptureError unless they are one finite tensor."""
    try:
        with torch.no_grad():
            outputs = module(example)
    except Exception as error:
        raise CaptureError(
            f"{type(module).__name__} does not run on a batch of shape {tuple(example.shape)} alone: {error}. "
            "If it was trained on another shape, give that with --input-size"
        ) from error
    if not isinstance(outputs, Tensor):
        raise CaptureError(
            f"{type(module).__name__} returns {type(outputs).__name__}; it must return one tensor of logits or "
            "features. Wrap it in a module whose forward(x) returns that tensor"
        )
    if outputs.ndim < 2:
        raise CaptureError(
            f"{type(module).__name__} returns a tensor of shape {tuple(outputs.shape)} for a batch of {len(example)}; "
            "it must return one row of outputs for each image"
        )
    if torch.equal(outputs, outputs[:1].expand_as(outputs)):
        log.warning(
            "%s returns the same outputs for every image, so a comparison of outputs proves little",
            type(module).__name__,
        )
    if not outputs.isfinite().all():
        raise CaptureError(
            f"{type(module).__name__} returns numbers that are not finite; check its weights for NaN and infinity"
        )
    return outputs


def _require_repeatable(module: nn.Module, example: Tensor, outputs: Tensor) -> None:
    """Raises CaptureError if a second run on the same images gives other outputs.

    Every later check compares outputs, so that a pass would be blamed for the model's noise.
    """
    state = torch.get_rng_state()
    again = _run_original(module, example)
    if again.shape == outputs.shape and torch.equal(again, outputs):
        if not torch.equal(state, torch.get_rng_state()):
            log.warning("%s draws random numbers in evaluation mode; its outputs did not change", type(module).__name__)
        return
    moved = (
        relative_difference(outputs.numpy(force=True), again.numpy(force=True))
        if again.shape == outputs.shape
        else float("inf")
    )
    raise CaptureError(
        f"{type(module).__name__} gives other outputs when the same images are run again: they differ by {moved:.1e} "
        "of their size. It probably draws random numbers in evaluation mode, or keeps state between calls; make "
        "forward the same for the same images when module.training is False"
    )


def _check_same(model: Model, reference: nn.Module, expected: Tensor) -> None:
    """Raises CaptureError if graph and module differ on the example or on another batch size."""
    other = noise(model.example.shape[1:], batch=3, seed=1).to(model.example.dtype)
    for images, wanted in ((model.example, expected), (other, _run_original(reference, other))):
        try:
            found = run_example(model) if images is model.example else model(images)
        except Exception as error:
            raise CaptureError(
                f"the traced graph does not run on a batch of {len(images)}: {error}. Its forward probably fixes a "
                "shape, or keeps state from an earlier trace"
            ) from error
        difference = (
            relative_difference(wanted.numpy(force=True), found.numpy(force=True))
            if found.shape == wanted.shape
            else float("inf")
        )
        if difference > CAPTURE_DRIFT:
            raise CaptureError(
                f"the traced graph computes something else: outputs on a batch of {len(images)} differ by "
                f"{difference:.1e} of the largest output; {CAPTURE_DRIFT:.0e} is allowed. Its forward probably "
                "branches on values or draws random numbers"
            )


def _keep_layer_modules(graph_module: fx.GraphModule, root: nn.Module) -> None:
    """Restores a Linear or Conv2d whose parameters the graph reads without calling it, such as BEiT's qkv.

    torch.fx keeps an empty module in its place, so the weight would no longer belong to a layer.
    """
    for node in graph_module.graph.nodes:
        owner = str(node.target).rpartition(".")[0] if node.op == "get_attr" else ""
        if owner and isinstance(root.get_submodule(owner), nn.Linear | nn.Conv2d):
            graph_module.set_submodule(owner, root.get_submodule(owner))
