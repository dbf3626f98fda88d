"""Builds a torch.fx graph from the JSON of a .pt2 program."""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from mpcompile.frontend.exported.arguments import constant_of, value_of
from mpcompile.frontend.exported.expressions import size_of, symbolic_value
from mpcompile.frontend.exported.operators import GROUPS, allowed_operator
from mpcompile.frontend.exported.program import ProgramInput
from mpcompile.frontend.exported.raw_tensors import META_FIELDS, dtype_of
from mpcompile.frontend.exported.refusal import ProgramRefused, mapping, name, path, sequence, shown, text, union

GRAPH_FIELDS = (
    "inputs", "outputs", "nodes", "tensor_values", "sym_int_values", "sym_bool_values", "is_single_tensor_return",
    "custom_obj_values", "sym_float_values",
)  # fmt: skip
NODE_FIELDS = ("target", "inputs", "outputs", "metadata", "is_hop_single_tensor_return", "name")
STORED = {  # input specs of tensors that the program holds, with the field of the name
    "parameter": "parameter_name",
    "buffer": "buffer_name",
    "tensor_constant": "tensor_constant_name",
}
RESULTS = ("as_tensor", "as_sym_int", "as_sym_float", "as_sym_bool")


@dataclass(slots=True)
class GraphBuilder:
    """A torch.fx graph that grows in the order of the JSON.

    Attributes:
        source: the JSON of the graph.
        metas: sizes and type of each tensor in it, by name.
        graph: what was built so far.
        nodes: the node of each name of the JSON.
    """

    source: Mapping[str, Any]
    metas: Mapping[str, tuple[tuple[int | None, ...], tuple[int, ...], torch.dtype]]
    graph: fx.Graph = field(default_factory=fx.Graph)
    nodes: dict[str, fx.Node] = field(default_factory=dict)

    @staticmethod
    def of(value: object) -> "GraphBuilder":
        """A builder of this JSON graph, after all sizes and symbolic values in it were checked."""
        source = mapping(value, "graph", GRAPH_FIELDS)
        if source.get("custom_obj_values"):
            raise ProgramRefused(f"holds {shown(source['custom_obj_values'])}, objects of custom classes")
        for key in ("sym_int_values", "sym_float_values", "sym_bool_values"):
            for symbol, content in mapping(source.get(key, {}), key).items():
                kind, inner = union(content, name(symbol, key))
                if kind not in ("as_int", "as_float", "as_bool"):
                    symbolic_value(kind, inner, symbol)
        values = mapping(source.get("tensor_values"), "tensor_values")
        return GraphBuilder(source, {name(key, "tensor_values"): _meta(meta, key) for key, meta in values.items()})

    def add_inputs(
        self, specs: object, tensors: Mapping[str, Tensor]
    ) -> tuple[tuple[ProgramInput, ...], frozenset[str]]:
        """Adds placeholders and `get_attr` nodes. Returns the user's inputs and the names of transient tensors."""
        values = sequence(self.source.get("inputs"), "inputs")
        kinds = [union(spec, "input_specs") for spec in sequence(specs, "input_specs")]
        if len(kinds) != len(values):
            raise ProgramRefused(f"has {len(values)} inputs in its graph and {len(kinds)} in its signature")
        inputs, transient = [], set()
        for (kind, spec), value in zip(kinds, values, strict=True):
            if kind in STORED:
                found = mapping(spec, kind, ("arg", STORED[kind], "persistent"))
                target = path(found.get(STORED[kind]), kind)
                if target not in tensors:
                    raise ProgramRefused(f"reads {target}, of which it holds no values")
                self._define(_input_name(value), self.graph.create_node("get_attr", target))
                if kind == "tensor_constant" or found.get("persistent") is False:
                    transient.add(target)
            elif kind in ("user_input", "constant_input"):
                inputs.append(self._user_input(value, spec, kind))
            else:
                raise ProgramRefused(f"has an input of the kind {shown(kind)}, which is no tensor")
        return tuple(inputs), frozenset(transient)

    def _user_input(self, value: object, spec: object, kind: str) -> ProgramInput:
        """Adds the placeholder of an argument of the program."""
        value_kind, _ = union(value, "inputs")
        if value_kind != "as_tensor":
            constant = mapping(spec, kind, ("name", "value", "arg"))
            given = constant.get("name") or f"constant_{len(self.nodes)}"
            self._define(name(given, kind), self.graph.placeholder(given))
            return ProgramInput(given, constant=constant_of(value, "inputs"))
        key = _input_name(value)
        if key not in self.metas:
            raise ProgramRefused(f"does not state the shape of its input {key}")
        sizes, free, dtype = self.metas[key]
        known = tuple(size for size in sizes if size is not None)
        if len(known) != len(sizes):
            raise ProgramRefused(f"has the input {key} with a size that was not recorded; export it again")
        self._define(key, self.graph.placeholder(key))
        return ProgramInput(key, known, dtype, free)

    def add_nodes(self) -> None:
        """Adds the calls."""
        for value in sequence(self.source.get("nodes"), "nodes"):
            node = mapping(value, "nodes", NODE_FIELDS)
            target = node.get("target")
            if isinstance(target, str) and target in GROUPS:
                self._add_group(node, *GROUPS[target])
            else:
                self._add_call(node, allowed_operator(target))

    def _add_group(self, source: Mapping[str, Any], position: int, off: int | None) -> None:
        """Adds the calls of a part that runs without gradients or with autocast switched off."""
        where = f"a call of {source['target']}"
        given: list[Any] = [mapping(part, where).get("arg") for part in sequence(source.get("inputs"), where)]
        if len(given) <= position or union(given[position], where)[0] != "as_graph":
            raise ProgramRefused(f"lacks the part of the graph in {where}")
        if off is not None and value_of(given[off], self.nodes, where) is not False:
            raise ProgramRefused("computes a part of itself in autocast; export the model without torch.autocast")
        inner = GraphBuilder.of(mapping(given[position]["as_graph"], where, ("name", "graph")).get("graph"))
        names = [_input_name(value) for value in sequence(inner.source.get("inputs"), where)]
        values = [value_of(value, self.nodes, where) for value in given[position + 1 :]]
        if len(names) != len(values) or not all(isinstance(value, fx.Node) for value in values):
            raise ProgramRefused(f"passes {len(values)} arguments for {len(names)} inputs in {where}")
        inner.graph, inner.nodes = self.graph, dict(zip(names, values, strict=True))
        inner.add_nodes()
        results = [value_of(value, inner.nodes, where) for value in sequence(inner.source.get("outputs"), where)]
        outputs = sequence(source.get("outputs"), where)
        if len(outputs) == 1 and union(outputs[0], where)[0] == "as_tensors":
            outputs = [{"as_tensor": part} for part in sequence(outputs[0]["as_tensors"], where)]
        if len(outputs) != len(results):
            raise ProgramRefused(f"states {len(outputs)} results of {where}, which has {len(results)}")
        for output, result in zip(outputs, results, strict=True):
            if union(output, where)[0] != "as_none" and isinstance(result, fx.Node):
                self._define(_result_name(*union(output, where), where), result)

    def _add_call(self, source: Mapping[str, Any], target: Callable[..., Any]) -> None:
        where = f"a call of {source['target']}"
        given = []
        for part in sequence(source.get("inputs"), where):
            argument = mapping(part, where, ("name", "arg", "kind"))
            given.append((text(argument.get("name", ""), where), value_of(argument.get("arg"), self.nodes, where)))
        mapping(source.get("metadata", {}), where)  # what torch prints; dropped
        outputs = sequence(source.get("outputs"), where)
        if isinstance(target, torch._ops.OpOverload):
            args, kwargs = _by_schema(target, dict(given), where)
            returns = target._schema.returns
            several = len(returns) > 1 or (len(returns) == 1 and "List" in type(returns[0].real_type).__name__)
        else:
            args, kwargs, several = tuple(value for _, value in given), {}, False
        node = self.graph.call_function(target, args, kwargs)
        if not several:
            if len(outputs) > 1:
                raise ProgramRefused(f"states {len(outputs)} results of {where}, which has one")
            for output in outputs:
                self._define(_result_name(*union(output, where), where), node)
            return
        if len(outputs) == 1 and union(outputs[0], where)[0] == "as_tensors":
            outputs = [{"as_tensor": part} for part in sequence(outputs[0]["as_tensors"], where)]
        for index, output in enumerate(outputs):
            kind, content = union(output, where)
            if kind != "as_none":
                self._define(
                    _result_name(kind, content, where), self.graph.call_function(operator.getitem, (node, index))
                )

    def add_outputs(self, specs: object) -> int:
        """Adds the flat tuple of results. Returns their number; refuses programs that write to their buffers."""
        kinds = [union(spec, "output_specs") for spec in sequence(specs, "output_specs")]
        for kind, spec in kinds:
            if kind != "user_output":
                raise ProgramRefused(f"has the result {shown(kind)}: {shown(spec)}; a model must keep no state")
        values = sequence(self.source.get("outputs"), "outputs")
        results = [
            None if union(value, "outputs")[0] == "as_none" else value_of(value, self.nodes, "outputs")
            for value in values
        ]
        self.graph.output(tuple(results))
        self.graph.eliminate_dead_code(is_impure_node=_is_needed)
        return len(results)

    def _define(self, key: str, node: fx.Node) -> None:
        if key in self.nodes:
            raise ProgramRefused(f"gives {shown(key)} twice")
        self.nodes[key] = node


def _is_needed(node: fx.Node) -> bool:
    """Whether a node without readers stays: inputs, the output, and writes into another tensor."""
    writes = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    return node.op in ("placeholder", "output") or writes


def _meta(meta: object, where: str) -> tuple[tuple[int | None, ...], tuple[int, ...], torch.dtype]:
    """Sizes (hints of symbolic ones), axes with a symbolic size, and type that a tensor's description states."""
    found = mapping(meta, where, META_FIELDS)
    sizes = [size_of(size, where) for size in sequence(found.get("sizes"), where)]
    for stride in (*sequence(found.get("strides"), where), found.get("storage_offset")):
        size_of(stride, where)
    free = tuple(axis for axis, (_, symbolic) in enumerate(sizes) if symbolic)
    return tuple(size for size, _ in sizes), free, dtype_of(found.get("dtype"), where)


def _input_name(value: object) -> str:
    kind, content = union(value, "inputs")
    if kind != "as_tensor":
        raise ProgramRefused(f"has an input of the kind {shown(kind)}; a tensor is needed")
    return name(mapping(content, "inputs", ("name",)).get("name"), "inputs")


def _result_name(kind: str, content: object, where: str) -> str:
    if kind not in RESULTS:
        raise ProgramRefused(f"has a result of the kind {shown(kind)} in {where}, which mpcompile does not know")
    field_name = "name" if kind == "as_tensor" else "as_name"
    return name(mapping(content, where, (field_name,)).get(field_name), where)


def _by_schema(
    target: torch._ops.OpOverload, given: dict[str, Any], where: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments by position up to the first that is left out, and by name from there on."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for argument in target._schema.arguments:
        if argument.name in given:
            value = given.pop(argument.name)
            if kwargs or argument.kwarg_only or len(args) < _position(target, argument.name):
                kwargs[argument.name] = value
            else:
                args.append(value)
        elif not argument.has_default_value():
            raise ProgramRefused(f"lacks the argument {argument.name} in {where}")
    if given:
        raise ProgramRefused(f"has the unknown argument {shown(next(iter(given)))} in {where}")
    return tuple(args), kwargs


def _position(target: torch._ops.OpOverload, key: str) -> int:
    return [argument.name for argument in target._schema.arguments].index(key)
