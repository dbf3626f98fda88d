"""Simplifies the graph of an exported program: without assertions and identities, and without in-place writes where
nothing else can see them.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from mpcompile.frontend.exported.refusal import ProgramRefused

ASSERTIONS = frozenset(
    [
        "_assert_tensor_metadata",
        "_assert_scalar",
        "_assert_async",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
    ]
)
DROPOUTS = frozenset(["dropout", "dropout_", "feature_dropout", "feature_alpha_dropout"])
IDENTITIES = frozenset(["alias", "alias_", "detach", "detach_", "resolve_conj", "resolve_neg", *DROPOUTS])
VIEWS = frozenset(  # results that share their memory with the first argument, or may share it
    """
    alias atleast_1d atleast_2d atleast_3d broadcast_to chunk contiguous detach diagonal expand expand_as flatten
    getitem imag movedim moveaxis mT narrow numpy_T permute ravel real reshape reshape_as select slice split
    split_with_sizes squeeze swapaxes swapdims t tensor_split to transpose type_as unbind unflatten unfold unsqueeze
    view view_as view_as_complex view_as_real unsafe_chunk unsafe_split _unsafe_view hsplit vsplit dsplit
    """.split()  # noqa: SIM905
)


def base_name(node: fx.Node) -> str:
    """The name of an aten operator without its overload; the name of another function."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target._schema.name).partition("::")[2]
    return str(getattr(node.target, "__name__", node.target))


def named_arguments(node: fx.Node) -> Mapping[str, Any]:
    """The arguments of a call of an aten operator by their names in its schema, with its defaults."""
    found = {}
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if position < len(node.args):
            found[argument.name] = node.args[position]
        else:
            found[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return found


def simplify(graph: fx.Graph) -> None:
    """Simplifies a graph in place. Raises ProgramRefused for a program that was exported in training mode."""
    for node in list(graph.nodes):
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        name = base_name(node)
        _require_evaluation(node, name)
        if name in ASSERTIONS:
            graph.erase_node(node)
        elif name in IDENTITIES or (name == "slice" and _takes_all(node)):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for node in list(graph.nodes):
        functional = _functional(node) if node.op == "call_function" else None
        if functional is None:
            _require_own_memory(node)
        else:
            with graph.inserting_before(node):
                new = graph.call_function(functional, node.args, node.kwargs)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
    graph.eliminate_dead_code(is_impure_node=is_needed)


def is_needed(node: fx.Node) -> bool:
    """Whether a node without readers stays: inputs, the output, and writes into another tensor."""
    writes = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    return node.op in ("placeholder", "output") or writes


def _require_evaluation(node: fx.Node, name: str) -> None:
    """Refuses operators that do something else in training."""
    arguments = named_arguments(node)
    if (name in DROPOUTS and arguments.get("train") and arguments.get("p")) or (
        name == "batch_norm" and arguments.get("training")
    ):
        raise ProgramRefused(f"was exported in training mode ({name} is active); call model.eval() before the export")


def _takes_all(node: fx.Node) -> bool:
    """Whether a slice takes every element of its axis."""
    found = named_arguments(node)
    return found["start"] in (None, 0) and found["end"] in (None, sys.maxsize) and found["step"] == 1


def _functional(node: fx.Node) -> Callable[..., Any] | None:
    """The form of an in-place operator that makes a new tensor, if nobody else sees the written tensor; else None.

    The written tensor must be new, or a view of a new one, and have this node as its only reader.
    """
    name = base_name(node)
    if not isinstance(node.target, torch._ops.OpOverload) or not name.endswith("_") or name.startswith("_"):
        return None
    packet = getattr(torch.ops.aten, name[:-1], None)
    overload = node.target._overloadname
    if packet is None or overload not in packet.overloads():
        return None
    written = node.args[0]
    while isinstance(written, fx.Node) and written.op != "get_attr" and len(written.users) == 1:
        if not _shares_memory(written):
            functional: Callable[..., Any] = getattr(packet, overload)
            return functional
        written = written.args[0]
    return None


def _shares_memory(node: fx.Node) -> bool:
    """Whether a value is a view of an earlier one, or is the earlier one after a write."""
    name = base_name(node)
    return node.op == "call_function" and (name in VIEWS or (name.endswith("_") and not name.startswith("_")))


def _require_own_memory(node: fx.Node) -> None:
    """Refuses writes into parameters, buffers and inputs: such a program gives other results when it runs again."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return
    written = node.args[0]
    while isinstance(written, fx.Node) and _shares_memory(written):
        written = written.args[0]
    if isinstance(written, fx.Node) and written.op != "call_function":
        raise ProgramRefused(f"writes into {written.target} ({base_name(node)}); a model must keep no state")
