"""Reads the program of a .pt2 archive into a torch.fx graph, field by field, without torch.export.load.

torch.export.load runs what it reads: size expressions as Python, pickles, attribute walks for call targets, guards and
names that become code. This reader looks operators up in a list (operators.py), parses expressions without evaluating
them (expressions.py), and builds tensors from raw bytes. Fields that it does not use are either checked or, if torch
only prints them (source lines, module names), dropped.
"""

from collections.abc import Mapping
from typing import Any

from torch.utils import _pytree as pytree

from mpcompile.frontend.exported.archive import CONSTANTS, PROGRAM, WEIGHTS, parsed_json, read_members
from mpcompile.frontend.exported.graph_builder import GraphBuilder
from mpcompile.frontend.exported.guards import is_size_guard
from mpcompile.frontend.exported.program import Program
from mpcompile.frontend.exported.raw_tensors import tensors_of
from mpcompile.frontend.exported.refusal import ProgramRefused, integer, mapping, name, sequence, shown
from mpcompile.frontend.exported.tree_specs import children_of, tree_spec

SCHEMA = 8  # the major version of torch's schema that this reader follows
PROGRAM_FIELDS = (
    "graph_module", "opset_version", "range_constraints", "schema_version", "verifiers", "torch_version", "guards_code",
)  # fmt: skip
MODULE_FIELDS = ("graph", "signature", "module_call_graph", "metadata", "treespec_namedtuple_fields")
CALL_FIELDS = ("inputs", "outputs", "in_spec", "out_spec", "forward_arg_names")


def read_program(content: bytes) -> Program:
    """The program in the bytes of a .pt2 archive. Raises ProgramRefused with the reason not to read it."""
    members = read_members(content)
    root = mapping(parsed_json(members[PROGRAM], PROGRAM), PROGRAM, PROGRAM_FIELDS)
    _require_version(root)
    module = mapping(root.get("graph_module"), "graph_module", MODULE_FIELDS)
    _require_plain_symbols(root)
    persistent, constants = (
        tensors_of(parsed_json(members[config], config), members, config.rpartition("/")[0])
        for config in (WEIGHTS, CONSTANTS)
    )
    tensors = {**persistent, **constants}
    signature = mapping(module.get("signature"), "signature", ("input_specs", "output_specs"))
    builder = GraphBuilder.of(module.get("graph"))
    inputs, transient = builder.add_inputs(signature.get("input_specs"), tensors)
    builder.add_nodes()
    outputs = builder.add_outputs(signature.get("output_specs"))
    in_spec, out_spec, arguments = _call_signature(module.get("module_call_graph"))
    if in_spec.num_leaves != len(inputs) or out_spec.num_leaves != outputs:
        raise ProgramRefused("has other numbers of inputs or outputs in its graph than in its signature")
    return Program(
        graph=builder.graph,
        tensors=tensors,
        transient=transient | frozenset(constants.keys() - persistent.keys()),
        inputs=inputs,
        in_spec=in_spec,
        out_spec=out_spec,
        arguments=arguments,
    )


def _require_version(root: Mapping[str, Any]) -> None:
    """Refuses programs of another major version of the schema, and other dialects than those of torch.export."""
    version = mapping(root.get("schema_version"), "schema_version", ("major", "minor"))
    if integer(version.get("major"), "schema_version") != SCHEMA:
        raise ProgramRefused(
            f"has version {version['major']} of torch.export's schema, and version {SCHEMA} is read; load it with the "
            f"torch that wrote it ({shown(root.get('torch_version'))}) and export it again with a current one"
        )


def _require_plain_symbols(root: Mapping[str, Any]) -> None:
    """Refuses ranges and guards that are not about sizes; torch compiles guards to Python."""
    for symbol, bounds in mapping(root.get("range_constraints", {}), "range_constraints").items():
        name(symbol, "range_constraints")
        for value in mapping(bounds, "range_constraints", ("min_val", "max_val")).values():
            if value is not None and value not in ("Infinity", "-Infinity"):
                integer(value, "range_constraints")
    for guard in sequence(root.get("guards_code", []), "guards_code"):
        if not is_size_guard(guard):
            raise ProgramRefused(
                f"has the guard {shown(guard)}, which is more than a comparison of sizes; loading would run it"
            )


def _call_signature(calls: object) -> tuple[pytree.TreeSpec, pytree.TreeSpec, tuple[str, ...]]:
    """The structures of arguments and result, and the names of the arguments, of the whole program."""
    found: tuple[pytree.TreeSpec, pytree.TreeSpec, tuple[str, ...]] | None = None
    for call in sequence(calls, "module_call_graph"):
        entry = mapping(call, "module_call_graph", ("fqn", "signature"))
        if entry.get("signature") is None:
            continue
        signature = mapping(entry["signature"], "module_call_graph", CALL_FIELDS)
        in_spec, out_spec = (tree_spec(signature.get(key), key) for key in ("in_spec", "out_spec"))
        if entry.get("fqn") == "" and found is None:
            names = signature.get("forward_arg_names") or []
            given = tuple(name(part, "forward_arg_names") for part in sequence(names, "forward_arg_names"))
            found = (in_spec, out_spec, given)
    if found is None:
        raise ProgramRefused("has no call signature")
    in_spec, out_spec, arguments = found
    if in_spec.type is not tuple or [child.type for child in children_of(in_spec)] != [tuple, dict]:
        raise ProgramRefused("has arguments that are no pair of positional ones and keywords")
    for keyword in children_of(in_spec)[1].context:
        name(keyword, "the keywords of the program")
    return in_spec, out_spec, arguments
