"""Captures an nn.Module as a Model: one recorded run, checked to compute the same outputs.

A copy of the module is run once under the recorder (mpcompile/frontend/recorder.py). The graph is then compared with
the original on other images and on another batch size. If a run cannot be recorded, torch.export is tried
(mpcompile/frontend/exported/). nn.MultiheadAttention is decomposed (mpcompile/frontend/multihead_attention.py). A
CaptureError names the line of model code that cannot be captured.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from mpcompile.errors import CaptureError
from mpcompile.frontend.cached_functions import empty_caches
from mpcompile.frontend.call_inputs import CallInputs, call_inputs, require_kinds
from mpcompile.frontend.capture_checks import checked_outputs, require_repeatable, require_same
from mpcompile.frontend.capture_refusals import copy_refusal, record_refusal
from mpcompile.frontend.conv1d import as_two_dimensional
from mpcompile.frontend.multihead_attention import decompose_attention
from mpcompile.frontend.plain_copy import copied, plain_copy, wrapped
from mpcompile.frontend.preprocessing import source_of
from mpcompile.frontend.primary_output import outputs_in_order
from mpcompile.frontend.recorder import record
from mpcompile.ir.model import Model
from mpcompile.ir.source import Source

log = logging.getLogger(__name__)


def noise(size: Sequence[int], batch: int = 2, seed: int = 0) -> Tensor:
    """Standard normal noise (batch, *size), determined by the seed."""
    return torch.randn(batch, *size, generator=torch.Generator().manual_seed(seed))


def capture(
    module: nn.Module,
    source: Source | None = None,
    example: Tensor | tuple[Tensor, ...] | Mapping[str, Tensor] | None = None,
    leaves: Sequence[str] = (),
    *,
    inputs: Mapping[str, Tensor] | None = None,
    primary: str | None = None,
) -> Model:
    """Captures a module as a Model. The graph must give the module's outputs on the example and on another batch size.

    Args:
        module: the model; it is not changed. A half-precision module is captured in float32.
        source: its name and preprocessing; by default its class name and the preprocessing of its `pretrained_cfg`,
            or ImageNet's.
        example: a batch (b, c, h, w), or all inputs, the images first: a tuple in the order of forward's arguments, or
            tensors by the names of the arguments. By default noise of the source's size.
        leaves: qualified names of modules to keep whole.
        inputs: examples of the inputs beside the images, by the names of forward's arguments.
        primary: the path of the output that agreement, certificates and distillation compare, such as `logits`; by
            default the one with a usual name (mpcompile/frontend/primary_output.py).

    Raises CaptureError if the run cannot be recorded, an output is no finite tensor, or the graph computes something
    else.

    Other threads may run modules meanwhile.
    """
    require_kinds(module, example, inputs or {})
    while (inner := wrapped(module)) is not None:
        module = inner
    kind = type(module).__name__
    source = source or source_of(module, name=kind, arch=kind, sha256="")
    dtype = _computing_type(module)
    if isinstance(example, Mapping):
        (_, images), *others = example.items()
        example, inputs = images, {**dict(others), **(inputs or {})}
    called = call_inputs(module, noise(source.size) if example is None else example, inputs)
    called = called.with_tensors({name: _as(one, dtype) for name, one in called.tensors.items()})
    try:
        reference = copied(module).eval().to(dtype)
        root, folded = plain_copy(reference)
    except Exception as error:
        raise CaptureError(copy_refusal(module, error)) from error
    _require_modules(root, leaves)
    for note in folded:
        log.warning("%s: %s", kind, note)
    expected = checked_outputs(reference, called)
    require_repeatable(reference, called, expected)
    try:
        model = _recorded(root, reference, called, source, leaves, primary)
    except CaptureError as refused:
        model = _exported(reference, called, source, primary, refused)
    return replace(model, notes=(*model.notes, *folded))


def _exported(
    reference: nn.Module, called: CallInputs, source: Source, primary: str | None, refused: CaptureError
) -> Model:
    """The model as torch.export traces it. Raises `refused`, why it cannot be recorded, if that fails too."""
    from mpcompile.frontend.exported import exported  # imported here, since few models need it

    positional = tuple(one for name, one in called.tensors.items() if name not in called.keywords)
    by_keyword = {keyword: called.tensors[name] for name, keyword in called.keywords.items()}
    if positional and by_keyword:
        raise refused
    kind = type(reference).__name__
    try:
        traced = exported(plain_copy(reference)[0], positional or by_keyword)
        model = _recorded(traced, reference, called, source, (), primary)
    except CaptureError as other:
        log.info("%s: torch.export does not take it either: %s", kind, other)
        raise refused from other
    log.info("%s was captured by torch.export, since one run could not be recorded: %s", kind, refused)
    return replace(model, captured_by="export")


def _recorded(
    root: nn.Module,
    reference: nn.Module,
    called: CallInputs,
    source: Source,
    leaves: Sequence[str],
    primary: str | None,
) -> Model:
    """The model whose graph is one run of `root`, compared with `reference`. Raises CaptureError."""
    kind = type(reference).__name__
    copies = {name: one.clone() for name, one in called.tensors.items()}  # forward may write into its inputs
    try:
        with empty_caches(root):
            recorder, result = record(root, copies, lambda: called.run(root, copies), leaves)
        outputs = outputs_in_order(result, kind, primary, tuple(called.tensors))
        graph = recorder.finished([tensor for _, tensor in outputs.tensors])
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(record_refusal(root, error)) from error
    _keep_layer_modules(graph, root)
    decompose_attention(graph)
    as_two_dimensional(graph)
    images, *others = called.tensors.values()
    model = Model(
        graph=graph.eval(),
        example=images,
        source=source,
        others=tuple(others),
        input_names=tuple(called.tensors),
        output_names=tuple(name for name, _ in outputs.tensors),
        output_tree=outputs.tree,
        notes=outputs.notes,
    )
    require_same(model, reference, called, outputs.order)
    return model


def _computing_type(module: nn.Module) -> torch.dtype:
    """The type to capture in: float64 for a float64 module, else float32 (half precision is too coarse to compare)."""
    own = next((p.dtype for p in module.parameters() if p.dtype.is_floating_point), torch.float32)
    return torch.float64 if own == torch.float64 else torch.float32


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _require_modules(module: nn.Module, names: Sequence[str]) -> None:
    """Raises CaptureError if a name is not a module of the model."""
    known = dict(module.named_modules())
    for name in names:
        if name not in known:
            listed = [child for child, _ in module.named_children()]
            shown = ", ".join(listed[:4]) + (", …" if len(listed) > 4 else "")
            raise CaptureError(f"--leaf {name!r} is not a module of {type(module).__name__}; it has {shown or 'none'}")


def _keep_layer_modules(graph_module: fx.GraphModule, root: nn.Module) -> None:
    """Restores a Linear or convolution whose parameters the graph reads without calling it, such as BEiT's qkv.

    torch.fx keeps an empty module in its place, so the weight would no longer belong to a layer.
    """
    for node in graph_module.graph.nodes:
        owner = str(node.target).rpartition(".")[0] if node.op == "get_attr" else ""
        if owner and isinstance(root.get_submodule(owner), nn.Linear | _ConvNd):
            graph_module.set_submodule(owner, root.get_submodule(owner))
