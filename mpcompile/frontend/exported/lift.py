"""Lifts an exported program to an nn.Module with real layers, which returns what the exported model returned.

Operators that read "path.weight" become layers of torch.nn under their own names, so that the state dict keeps its keys
and passes find the layers. Other operators become the functions and methods that a model's Python code would call.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from mpcompile.frontend.exported.free_batch import ROW_DRIFT, example_inputs, run, with_free_batch
from mpcompile.frontend.exported.functions import torch_call
from mpcompile.frontend.exported.layers import layer_of, same_layer
from mpcompile.frontend.exported.memory import require_moderate_sizes
from mpcompile.frontend.exported.program import Program
from mpcompile.frontend.exported.refusal import ProgramRefused
from mpcompile.frontend.exported.simplify import simplify
from mpcompile.frontend.exported.tree_specs import children_of
from mpcompile.ir.parity import relative_difference

OWN_NAMES = frozenset(["meta", "graph", "code"])  # attributes of every fx.GraphModule


def lift(program: Program, name: str = "Exported") -> fx.GraphModule:
    """The program as an nn.Module in evaluation mode, for any batch size. Raises ProgramRefused with a reason.

    It takes and returns the structures that the exported model took and returned.
    """
    simplify(program.graph)
    require_moderate_sizes(program)
    graph = with_free_batch(program)
    layers = _call_layers(graph, program)
    for node in list(graph.nodes):
        if node.op == "call_function" and (call := torch_call(node)) is not None:
            node.op, node.target, node.args, node.kwargs = call.op, call.target, call.args, call.kwargs
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output") or _writes(node))
    module = fx.GraphModule(_root(program, layers), graph, name)
    _require_same(module, program)
    _restore_structure(module, program)
    module.eval()
    return module


def _writes(node: fx.Node) -> bool:
    """Whether a call may write into its arguments: an aten operator, or a method named for it."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    return node.op == "call_method" and str(node.target).endswith("_")


def _call_layers(graph: fx.Graph, program: Program) -> dict[str, nn.Module]:
    """Replaces operators by calls of layers, and returns the layers by name."""
    layers: dict[str, nn.Module] = {}
    for node in list(graph.nodes):
        found = layer_of(node, program.tensors) if node.op == "call_function" else None
        if found is None or (found[0] in layers and not same_layer(layers[found[0]], found[1])):
            continue
        layers.setdefault(*found)
        node.op, node.target, node.args, node.kwargs = "call_module", found[0], node.args[:1], {}
    return layers


def _root(program: Program, layers: dict[str, nn.Module]) -> nn.Module:
    """A module with the layers and all other tensors of the program, under their names."""
    root = nn.Module()
    for path, layer in sorted(layers.items()):  # parents first
        owner = _container(root, path.rpartition(".")[0])
        _add(owner, path, path.rpartition(".")[2], layer)
    for path, tensor in program.tensors.items():
        parent, _, name = path.rpartition(".")
        owner = _container(root, parent)
        if name in owner._parameters or name in owner._buffers:
            continue
        if hasattr(owner, name):
            raise ProgramRefused(f"has a tensor named {path}, which is no possible name of a tensor in a module")
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(name, tensor)
        else:
            owner.register_buffer(name, tensor, persistent=path not in program.transient)
    for name in (*root._modules, *root._parameters, *root._buffers):
        if name in OWN_NAMES:
            raise ProgramRefused(f"has a part named {name}, which torch.fx uses itself; rename it in the model")
    return root


def _container(root: nn.Module, path: str) -> nn.Module:
    """The module with this name, made of empty modules where there is none."""
    module = root
    for part in filter(None, path.split(".")):
        if part not in module._modules:
            _add(module, path, part, nn.Module())
        child = module._modules[part]
        assert child is not None
        module = child
    return module


def _add(owner: nn.Module, path: str, name: str, child: nn.Module) -> None:
    if hasattr(owner, name):
        raise ProgramRefused(f"has a tensor in {path}, which is no possible name of a module")
    owner.add_module(name, child)


def _require_same(module: fx.GraphModule, program: Program) -> None:
    """Refuses a lifted module that computes something else than the program on the exported batch."""
    inputs = example_inputs(program, program.inputs[0].shape[0] if program.inputs[0].shape else 1)
    wanted = run(program.graph, program, inputs)
    with torch.no_grad():
        found = fx.Interpreter(module).run(*inputs)
    for one, other in zip(found, wanted, strict=True):
        if isinstance(other, Tensor) and (
            one.shape != other.shape
            or relative_difference(other.double().numpy(force=True), one.double().numpy(force=True)) > ROW_DRIFT
        ):
            raise ProgramRefused("computes something else once its operators are layers; report this model")


def _restore_structure(module: fx.GraphModule, program: Program) -> None:
    """Gives the module the arguments and the result of the exported model."""
    positional, keywords = children_of(program.in_spec)
    leaves = [*children_of(positional), *children_of(keywords)]
    if all(leaf.is_leaf() for leaf in leaves) and _is_plain(program.out_spec):
        _name_arguments(module, program, list(keywords.context))
        output = module.graph.output_node()
        results: Any = output.args[0]
        output.args = (pytree.tree_unflatten(list(results), program.out_spec),)
    else:
        names = [*program.arguments[: len(children_of(positional))]]
        names += [f"arg{index}" for index in range(len(names), len(children_of(positional)))]
        names += [key for key in keywords.context if key not in names]
        module.graph._codegen = _PyTreeCodeGen(_PyTreeInfo(names, program.in_spec, program.out_spec))
    module.graph.lint()
    module.recompile()


def _is_plain(spec: pytree.TreeSpec) -> bool:
    """Whether a structure has only containers that torch.fx can return: tuples, lists and dicts."""
    return spec.is_leaf() or (spec.type in (tuple, list, dict) and all(map(_is_plain, children_of(spec))))


def _name_arguments(module: fx.GraphModule, program: Program, keywords: list[str]) -> None:
    """Names placeholders as the arguments of the exported model; constants become defaults."""
    placeholders = module.graph.find_nodes(op="placeholder")
    names = [*program.arguments[: len(placeholders) - len(keywords)], *keywords]
    for index, (node, given) in enumerate(zip(placeholders, program.inputs, strict=True)):
        if len(names) == len(placeholders):
            node.target = names[index]
        if given.shape is None:
            node.args = (given.constant,)
