"""The texts of errors about modules that cannot be copied or traced: the cause, the line of model code, the remedy."""

import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from torch import fx, nn

# Attributes and methods of a tensor that depend on its shape and type alone.
SHAPE_READS = frozenset(
    {"shape", "size", "dim", "ndim", "numel", "nelement", "ndimension", "stride", "dtype", "device"}
)
TRACING_CODE = ("/torch/fx/", "/torch/nn/modules/module.py", "/jaxtyping/", "/beartype/", str(Path(__file__).parent))


def copy_refusal(module: nn.Module, error: BaseException) -> str:
    """Why a module cannot be deep-copied, in torch's own words."""
    return f"{type(module).__name__} cannot be deep-copied, so it cannot be traced safely: {error}"


def trace_refusal(module: nn.Module, graph: fx.Graph | None, decided_by: fx.Node | None, error: BaseException) -> str:
    """Why a module cannot be traced: torch's reason, the line of model code, whether shape or values decide there.

    Args:
        module: the module.
        graph: the graph so far.
        decided_by: the node whose truth or length Python asked for; None if unknown, then the last node is meant.
        error: what tracing raised.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not any(part in frame.filename for part in TRACING_CODE)]
    where = f"{own[-1].filename}:{own[-1].lineno}: `{own[-1].line}`" if own else "an unknown line"
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    node = decided_by or next(reversed(list(graph.nodes)) if graph is not None else iter(()), None)
    owner = _owner(module, error.__traceback__)
    if owner:
        whole = f"keep the module around it whole with --leaf {owner}"
    else:
        whole = "move it into a module of its own, and keep that whole with --leaf NAME"
    if node is not None and _from_shape(node):
        remedy = (
            "It is the shape of the image that decides there, not its values: --input-size fixes the shape, so write "
            f"the number into that line, or {whole}"
        )
    else:
        remedy = f"Make that line independent of the values of the image, or {whole}"
    return f"{type(module).__name__} cannot be traced: {reason}. At {where}. {remedy}"


def _from_shape(node: fx.Node) -> bool:
    """Whether every path from the image to this node goes through a read of a shape, and there is one."""
    to_visit, seen, reads = [node], {node}, 0
    while to_visit:
        current = to_visit.pop()
        if current.op == "placeholder":
            return False
        if _reads_shape(current):
            reads += 1
            continue
        for source in current.all_input_nodes:
            if source not in seen:
                seen.add(source)
                to_visit.append(source)
    return reads > 0


def _reads_shape(node: fx.Node) -> bool:
    if node.op == "call_method":
        return str(node.target) in SHAPE_READS
    if node.op != "call_function":
        return False
    if node.target is getattr and len(node.args) > 1:
        return node.args[1] in SHAPE_READS
    return getattr(node.target, "__name__", "") in ("len", "_shape_as_tensor")


def _owner(module: nn.Module, trace: TracebackType | None) -> str:
    """The name of the innermost submodule whose code raised; empty if it was the module itself."""
    names = {id(part): name for name, part in module.named_modules()}
    return _innermost(names, _frames_of(trace))


def _frames_of(trace: TracebackType | None) -> Sequence[object]:
    """The `self` of each frame, outermost first."""
    found = []
    while trace is not None:
        found.append(trace.tb_frame.f_locals.get("self"))
        trace = trace.tb_next
    return found


def _innermost(names: dict[int, str], selves: Sequence[object]) -> str:
    return next((names[id(one)] for one in reversed(selves) if id(one) in names), "")
