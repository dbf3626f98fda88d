"""Captures an nn.Module as a Model: one recorded run, checked to compute the same outputs.

A copy of the module is run once under the recorder (mpcompile/frontend/recorder.py). The graph is then compared with
the original on other images and on another batch size. nn.MultiheadAttention is decomposed
(mpcompile/frontend/multihead_attention.py). A CaptureError names the line of model code that cannot be captured.
"""

import copy
import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from mpcompile.errors import CaptureError
from mpcompile.frontend.cached_functions import empty_caches
from mpcompile.frontend.call_inputs import CallInputs, call_inputs
from mpcompile.frontend.capture_checks import checked_outputs, require_repeatable, require_same
from mpcompile.frontend.capture_refusals import copy_refusal, record_refusal
from mpcompile.frontend.multihead_attention import decompose_attention
from mpcompile.frontend.preprocessing import source_of
from mpcompile.frontend.primary_output import outputs_in_order
from mpcompile.frontend.recorder import record
from mpcompile.ir.model import Model, Source

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
    primary: str | None = None,
) -> Model:
    """Captures a module as a Model. The graph must give the module's outputs on the example and on another batch size.

    Args:
        module: the model; it is not changed. A half-precision module is captured in float32.
        source: its name and preprocessing; by default its class name and the preprocessing of its `pretrained_cfg`,
            or ImageNet's.
        example: a batch (b, c, h, w); by default noise of the source's size. For a model with several inputs a tuple
            of tensors, or tensors by the names of forward's arguments. The first one holds the images.
        leaves: qualified names of modules to keep whole.
        primary: the path of the output that agreement, certificates and distillation compare, such as `logits`; by
            default the one with a usual name (mpcompile/frontend/primary_output.py).

    Raises CaptureError if the run cannot be recorded, an output is no finite tensor, or the graph computes something
    else.

    Other threads may run modules meanwhile.
    """
    while isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):  # made by torch.compile
        module = inner
    kind = type(module).__name__
    source = source or source_of(module, name=kind, arch=kind, sha256="")
    dtype = _computing_type(module)
    given = call_inputs(module, noise(source.size) if example is None else example)
    inputs = CallInputs({name: _as(one, dtype) for name, one in given.tensors.items()}, given.keywords)
    _require_modules(module, leaves)
    try:
        reference = copy.deepcopy(module).eval().to(dtype)
        root = copy.deepcopy(module).eval().to(dtype)
    except Exception as error:
        raise CaptureError(copy_refusal(module, error)) from error
    expected = checked_outputs(reference, inputs)
    require_repeatable(reference, inputs, expected)
    copies = {name: one.clone() for name, one in inputs.tensors.items()}  # forward may write into its inputs
    try:
        with empty_caches(root):
            recorder, result = record(root, copies, lambda: inputs.run(root, copies), leaves)
        outputs = outputs_in_order(result, kind, primary)
        graph = recorder.finished([tensor for _, tensor in outputs.tensors])
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(record_refusal(root, error)) from error
    _keep_layer_modules(graph, root)
    decompose_attention(graph)
    images, *others = inputs.tensors.values()
    model = Model(
        graph=graph.eval(),
        example=images,
        source=source,
        others=tuple(others),
        input_names=tuple(inputs.tensors),
        output_names=tuple(name for name, _ in outputs.tensors),
        output_tree=outputs.tree,
        notes=outputs.notes,
    )
    require_same(model, reference, inputs, outputs.order)
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
    """Restores a Linear or Conv2d whose parameters the graph reads without calling it, such as BEiT's qkv.

    torch.fx keeps an empty module in its place, so the weight would no longer belong to a layer.
    """
    for node in graph_module.graph.nodes:
        owner = str(node.target).rpartition(".")[0] if node.op == "get_attr" else ""
        if owner and isinstance(root.get_submodule(owner), nn.Linear | nn.Conv2d):
            graph_module.set_submodule(owner, root.get_submodule(owner))
