"""Archives with a harmless payload in each place from which torch.export.load runs code; it creates a marker file."""

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pt2_files import CONSTANTS, PROGRAM, WEIGHTS, Marks, pickled, small_file, with_json, with_members


@dataclass(frozen=True, slots=True)
class Payload:
    """One place of a payload.

    Attributes:
        build: the archive for a marker path.
        reason: a part of the reason with which it is refused, as a pattern.
        runs: when torch runs it: in `load`, in a `call` of the module that it loaded, or never (None), where torch
            refuses it too or cannot be made to run it in a few lines.
    """

    build: Callable[[Path], bytes]
    reason: str
    runs: str | None


def _opening(marker: Path) -> str:
    return f"open({str(marker)!r}, 'w').close()"


def _expression(marker: Path) -> bytes:
    def edit(program: Any) -> None:
        sizes = program["graph_module"]["graph"]["tensor_values"]["input"]["sizes"]
        expression = sizes[0]["as_expr"]
        expression["expr_str"] = f"{_opening(marker)} or {expression['expr_str']}"

    return with_json(small_file(), PROGRAM, edit)


def _output_expression(marker: Path) -> bytes:
    def edit(program: Any) -> None:
        graph = program["graph_module"]["graph"]
        graph["sym_int_values"]["s"] = {"as_expr": {"expr_str": _opening(marker), "hint": None}}

    return with_json(small_file(), PROGRAM, edit)


def _weights(marker: Path) -> bytes:
    def edit(config: Any) -> None:
        config["config"]["5.bias"].update(use_pickle=True, path_name="weight_77")

    return with_members(with_json(small_file(), WEIGHTS, edit), data__weights__weight_77=pickled(Marks(marker)))


def _constants(marker: Path) -> bytes:
    def edit(config: Any) -> None:
        config["config"]["c"] = {"path_name": "tensor_0", "is_param": False, "use_pickle": True, "tensor_meta": None}

    return with_members(with_json(small_file(), CONSTANTS, edit), data__constants__tensor_0=pickled(Marks(marker)))


def _named_object(kind: str, content: Callable[[Path], bytes]) -> Callable[[Path], bytes]:
    def build(marker: Path) -> bytes:
        def edit(config: Any) -> None:
            entry = {"path_name": f"{kind}_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
            config["config"]["c"] = entry

        archive = with_json(small_file(), CONSTANTS, edit)
        return with_members(archive, **{f"data__constants__{kind}_0": content(marker)})

    return build


def _legacy_weights(marker: Path) -> bytes:
    return with_members(small_file(), **{"data__weights__model.pt": pickled({"c": Marks(marker)})})


def _legacy_constants(marker: Path) -> bytes:
    return with_members(small_file(), **{"data__constants__model.pt": pickled({"c": Marks(marker)})})


def _examples(marker: Path) -> bytes:
    return with_members(small_file(), **{"data__sample_inputs__model.pt": pickled((Marks(marker),))})


def _node(change: dict[str, Any]) -> Callable[[Any], None]:
    def edit(program: Any) -> None:
        program["graph_module"]["graph"]["nodes"][2].update(change)

    return edit


def _writing_operator(marker: Path) -> bytes:
    """aten.from_file maps a file of any name, and creates it, when the program runs."""
    arguments = {"filename": {"as_string": str(marker)}, "shared": {"as_bool": True}, "size": {"as_int": 4}}
    inputs = [{"name": name, "arg": value, "kind": 1} for name, value in arguments.items()]
    call = {"target": "torch.ops.aten.from_file.default", "inputs": inputs, "metadata": {}, "name": "mapped"}

    def edit(program: Any) -> None:
        graph = program["graph_module"]["graph"]
        graph["nodes"].insert(0, {**call, "outputs": [{"as_tensor": {"name": "mapped"}}]})
        sizes = {"sizes": [{"as_int": 4}], "strides": [{"as_int": 1}]}
        graph["tensor_values"]["mapped"] = {**graph["tensor_values"]["linear"], **sizes}

    return with_json(small_file(), PROGRAM, edit)


def _walked_target(marker: Path) -> bytes:
    return with_json(small_file(), PROGRAM, _node({"target": "torch.serialization.os.system"}))


def _operator_argument(marker: Path) -> bytes:
    arguments = [{"name": "self", "arg": {"as_operator": "torch.serialization.os.system"}, "kind": 1}]
    return with_json(small_file(), PROGRAM, _node({"inputs": arguments}))


def _guard(marker: Path) -> bytes:
    def edit(program: Any) -> None:
        program["guards_code"] = [f"{_opening(marker)} is None"]

    return with_json(small_file(), PROGRAM, edit)


def _name(marker: Path) -> bytes:
    """A name of an input becomes a parameter of a function, so that a default value runs."""
    members = with_json(small_file(), PROGRAM, lambda program: None)
    name = f"input={_opening(marker)}"

    def edit(program: Any) -> None:
        text = json.dumps(program["graph_module"]).replace('"name": "input"}', f'"name": {json.dumps(name)}}}')
        program["graph_module"] = json.loads(text)
        values = program["graph_module"]["graph"]["tensor_values"]
        values[name] = values.pop("input")

    return with_json(members, PROGRAM, edit)


def _with_tree(child: Callable[[Path], dict[str, Any]]) -> Callable[[Path], bytes]:
    def build(marker: Path) -> bytes:
        def edit(program: Any) -> None:
            signature = program["graph_module"]["module_call_graph"][0]["signature"]
            signature["out_spec"] = json.dumps([1, child(marker)])

        return with_json(small_file(), PROGRAM, edit)

    return build


LEAF: dict[str, Any] = {"type": None, "context": None, "children_spec": []}


def _enumeration(marker: Path) -> dict[str, Any]:
    context = json.dumps([{"__enum__": True, "fqn": "marking_module:Any", "name": "x"}])
    return {"type": "builtins.dict", "context": context, "children_spec": [LEAF]}


def _factory(marker: Path) -> dict[str, Any]:
    context = {"default_factory_module": "marking_module", "default_factory_name": "x", "dict_context": ["a"]}
    return {"type": "collections.defaultdict", "context": context, "children_spec": [LEAF]}


PAYLOADS = {
    "expr_str": Payload(_expression, "it is not a size, and loading would run it", "load"),
    "sym_int_values": Payload(_output_expression, "it is not a size, and loading would run it", None),
    "weights": Payload(_weights, r"holds 5\.bias as a pickle", "load"),
    "constants": Payload(_constants, "holds c as a pickle", "load"),
    "opaque object": Payload(
        _named_object("opaque_obj", lambda marker: pickle.dumps(Marks(marker))),
        "opaque_obj_0.*a pickled object",
        "load",
    ),
    "custom object": Payload(
        _named_object("custom_obj", lambda marker: pickle.dumps(Marks(marker))), "custom_obj_0.*a custom class", None
    ),
    "legacy weights": Payload(_legacy_weights, "model.pt'.*pickled tensors", "load"),
    "legacy constants": Payload(_legacy_constants, "model.pt'.*pickled tensors", "load"),
    "sample_inputs": Payload(_examples, "sample_inputs.*more than tensors", "load"),
    "aten.from_file": Payload(_writing_operator, "calls 'torch.ops.aten.from_file.default', which is not on", "call"),
    "call target": Payload(_walked_target, "calls 'torch.serialization.os.system', which is not on the list", None),
    "operator argument": Payload(_operator_argument, "passes an operator as an argument", None),
    "guard": Payload(_guard, "more than a comparison of sizes", "call"),
    "name": Payload(_name, "as names become code", "load"),
    "enumeration in the tree": Payload(_with_tree(_enumeration), "is not tuple, list or dict", "load"),
    "factory in the tree": Payload(_with_tree(_factory), "is not tuple, list or dict", "load"),
}
