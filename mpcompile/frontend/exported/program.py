"""A program of torch.export as a torch.fx graph of its operators, with its parameters and buffers by name."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from mpcompile.frontend.exported.operators import GROUPS
from mpcompile.frontend.exported.refusal import ProgramRefused

PERSISTENT_KINDS = (InputKind.PARAMETER, InputKind.BUFFER)


@dataclass(frozen=True, slots=True)
class ProgramInput:
    """One input tensor, or a constant that the program was exported with.

    Attributes:
        name: its name in the graph.
        shape: the sizes that it was exported with; None for a constant.
        dtype: its type; None for a constant.
        free: the axes whose size may differ from the exported one.
        constant: the value of an argument that is no tensor.
    """

    name: str
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    free: tuple[int, ...] = ()
    constant: object = None


@dataclass(frozen=True, slots=True)
class Program:
    """An exported program.

    Attributes:
        graph: a placeholder for each input, `get_attr` for parameters and buffers, calls of operators, and an output
            that is a flat tuple.
        tensors: parameters and buffers by qualified name; names of one tied parameter hold one object.
        transient: names that are not in the state dict: buffers that are not persistent, and constants.
        inputs: in the order of the flat arguments.
        in_spec: the structure of the arguments, ((positional, …), {keyword: …}).
        out_spec: the structure of the result.
        arguments: names of the top-level arguments, where known.
    """

    graph: fx.Graph
    tensors: Mapping[str, Tensor]
    transient: frozenset[str]
    inputs: tuple[ProgramInput, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    arguments: tuple[str, ...] = ()


def program_of(exported: ExportedProgram) -> Program:
    """The Program of an ExportedProgram in memory. Raises ProgramRefused if it writes to its buffers or its inputs."""
    signature = exported.graph_signature
    if exported.module_call_graph[0].signature is None:
        raise ProgramRefused("has no call signature")
    stateful = [spec for spec in signature.output_specs if spec.kind is not OutputKind.USER_OUTPUT]
    if stateful:
        raise ProgramRefused(f"writes {stateful[0].target or stateful[0].arg} in each call; a model must keep no state")
    graph, values, parts = fx.Graph(), dict[fx.Node, fx.Node](), dict[fx.Node, tuple[fx.Node, ...]]()
    specs = dict(zip(exported.graph.find_nodes(op="placeholder"), signature.input_specs, strict=True))
    inputs, transient = [], set()
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node]
            if spec.kind is InputKind.USER_INPUT:
                values[node] = graph.placeholder(node.name)
                inputs.append(_input_of(node.name, node.meta.get("val")))
            elif spec.kind in (*PERSISTENT_KINDS, InputKind.CONSTANT_TENSOR) and spec.target is not None:
                values[node] = graph.create_node("get_attr", spec.target)
                if spec.kind is InputKind.CONSTANT_TENSOR or spec.persistent is False:
                    transient.add(spec.target)
            else:
                raise ProgramRefused(f"has an input of the kind {spec.kind.name}, which is no tensor")
        elif node.op == "output":
            outputs: Sequence[Any] = node.args[0]
            graph.output(tuple(values[part] if isinstance(part, fx.Node) else part for part in outputs))
        elif node.op == "call_function":
            _copy_call(node, graph, values, parts, exported.graph_module)
    named = {**exported.state_dict, **exported.constants}
    call = exported.module_call_graph[0].signature
    return Program(
        graph=graph,
        tensors={name: value for name, value in named.items() if isinstance(value, Tensor)},
        transient=frozenset(transient),
        inputs=tuple(inputs),
        in_spec=call.in_spec,
        out_spec=call.out_spec,
        arguments=tuple(call.forward_arg_names or ()),
    )


def _copy_call(
    node: fx.Node,
    graph: fx.Graph,
    values: dict[fx.Node, fx.Node],
    parts: dict[fx.Node, tuple[fx.Node, ...]],
    owner: torch.nn.Module,
) -> None:
    """Copies a call. A part that runs without gradients or with autocast switched off is copied call by call.

    `values` and `parts` get the copies: of calls, and of the results of such parts.
    """
    target = f"torch.ops.higher_order.{getattr(node.target, '__name__', '')}"
    if node.target is operator.getitem and node.args[0] in parts:
        values[node] = parts[node.args[0]][node.args[1]]  # type: ignore[index]
        return
    if target not in GROUPS:
        if any(earlier.op == "get_attr" for earlier in node.all_input_nodes):
            raise ProgramRefused(f"calls a part of itself in {node.target}, such as torch.cond")
        values[node] = graph.node_copy(node, values.__getitem__)
        return
    position, off = GROUPS[target]
    if off is not None and node.args[off] is not False:
        raise ProgramRefused("computes a part of itself in autocast; export the model without torch.autocast")
    inner: Any = owner.get_submodule(str(node.args[position].target))  # type: ignore[union-attr]
    given = iter(node.args[position + 1 :])
    for step in inner.graph.nodes:
        if step.op == "placeholder":
            values[step] = values[next(given)]  # type: ignore[index]
        elif step.op == "output":
            parts[node] = tuple(values[result] for result in step.args[0])
        elif step.op == "call_function":
            _copy_call(step, graph, values, parts, inner)


def _input_of(name: str, value: object) -> ProgramInput:
    """The description of an input by the example value that export recorded."""
    if not isinstance(value, Tensor):
        return ProgramInput(name, constant=value)
    symbolic: Sequence[Any] = value.shape
    sizes = [(size, None) if type(size) is int else (size.node.hint, axis) for axis, size in enumerate(symbolic)]
    if any(size is None for size, _ in sizes):
        raise ProgramRefused(f"has the input {name} with a size that was not recorded")
    free = tuple(axis for _, axis in sizes if axis is not None)
    return ProgramInput(name, tuple(int(size) for size, _ in sizes), value.dtype, free)
