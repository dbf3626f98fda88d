"""Decomposes nn.MultiheadAttention in a graph into projections, attention and output layer.

Capture keeps the module whole, and in evaluation mode it runs one fused kernel. That hides the keys, which token
merging needs, and its weights, which belong to no Linear: `in_proj_weight` packs the projections of query, key and
value. Here each projection becomes a Linear that the graph calls:

- self-attention (query, key and value are one tensor): one Linear `in_proj` with all rows of the packed weight;
- otherwise one Linear for each run of equal inputs: `in_proj_q` and `in_proj_kv` if key and value are one tensor,
  `in_proj_qk` and `in_proj_v` if query and key are, else `in_proj_q`, `in_proj_k` and `in_proj_v`;
- a module with weights of its own for each (`kdim`, `vdim`): `q_proj`, `k_proj` and `v_proj`.

mpcompile/frontend/stored_weights.py writes them under the names of the original class again.
"""

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch.nn.functional as F
from jaxtyping import Shaped
from torch import Tensor, fx, nn

ARGUMENTS = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights")


def decompose_attention(graph: fx.GraphModule) -> None:
    """Decomposes each nn.MultiheadAttention that `reasons_whole` does not name."""
    whole, modules = reasons_whole(graph), dict(graph.named_modules())
    for name, nodes in _calls(graph).items():
        module = modules[name]
        if name not in whole and isinstance(module, nn.MultiheadAttention):
            parts = _runs(nodes[0], module)
            graph.set_submodule(name, _with_projections(module, parts))
            for node in nodes:
                _decompose(node, module, parts)
    graph.recompile()


def reasons_whole(graph: fx.GraphModule) -> dict[str, str]:
    """Why a nn.MultiheadAttention stays whole, for each that does, as a sentence without a subject."""
    modules, calls = dict(graph.named_modules()), _calls(graph)
    reasons = {}
    for name, module in modules.items():
        if not isinstance(module, nn.MultiheadAttention):
            continue
        nodes = calls.get(name, [])
        found = [reason for node in nodes if (reason := _reason_call(node, module))]
        if found:
            reasons[name] = found[0]
        elif not nodes:
            reasons[name] = "is called inside a module that is kept whole"
        elif any(_reads_part(node, name) for node in graph.graph.nodes):
            reasons[name] = "has parameters that another operator reads"
        elif len({tuple(_runs(node, module)) for node in nodes}) > 1:
            reasons[name] = "is called as self-attention and as cross-attention"
        elif _runs(nodes[0], module) != ["qkv"] and _is_shared(module, modules.values()):
            reasons[name] = "shares its packed weight with another module"
    return reasons


def _calls(graph: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """The nodes that call each nn.MultiheadAttention, by its qualified name."""
    modules = dict(graph.named_modules())
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module" and isinstance(modules.get(str(node.target)), nn.MultiheadAttention):
            calls.setdefault(str(node.target), []).append(node)
    return calls


def _reason_call(node: fx.Node, module: nn.MultiheadAttention) -> str | None:
    """Why one call cannot be decomposed, or None."""
    given = _given(node)
    masks = [name for name in ("attn_mask", "key_padding_mask") if given.get(name) is not None]
    if masks:
        return f"is called with {' and '.join(masks)}"
    if given.get("is_causal"):
        return "is called with is_causal=True"
    if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
        return "adds a key and a value of its own (add_bias_kv or add_zero_attn)"
    if not all(user.target is operator.getitem and (user.args[1] == 0 or not user.users) for user in node.users):
        return "returns attention weights that the model uses"
    if module._forward_hooks or module._forward_pre_hooks:
        return "has hooks"
    if type(module).forward is not nn.MultiheadAttention.forward:
        return "is a subclass with a forward of its own"
    return None


def _reads_part(node: fx.Node, name: str) -> bool:
    """Whether a node reads a parameter of the module of this name, or calls a part of it."""
    return node.op in ("get_attr", "call_module") and str(node.target).startswith(f"{name}.")


def _is_shared(module: nn.MultiheadAttention, modules: Iterable[nn.Module]) -> bool:
    """Whether another module has the same packed weight."""
    own = module.in_proj_weight
    others = (other for other in modules if other is not module)
    return own is not None and any(own is value for other in others for value in other._parameters.values())


def _given(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by name."""
    return dict(zip(ARGUMENTS, node.args, strict=False)) | dict(node.kwargs)


def _reads_parameters(graph: fx.GraphModule, name: str) -> bool:
    """Whether other nodes read the parameters of this module, or call a part of it."""
    return any(
        node.op in ("get_attr", "call_module") and str(node.target).startswith(f"{name}.") for node in graph.graph.nodes
    )


def _runs(node: fx.Node, module: nn.MultiheadAttention) -> list[str]:
    """Query, key and value as runs of equal inputs: `qkv` for self-attention, `q` and `kv` for cross-attention.

    A module with separate weights has three.
    """
    given, runs = _given(node), ["q"]
    for before, name in (("query", "key"), ("key", "value")):
        if given[name] is given[before] and module.in_proj_weight is not None:
            runs[-1] += name[0]
        else:
            runs.append(name[0])
    return runs


def _with_projections(module: nn.MultiheadAttention, parts: Sequence[str]) -> nn.Module:
    """A module without a forward of its own that holds the projections and the output layer as Linear layers."""
    held, width, bias = nn.Module(), module.embed_dim, module.in_proj_bias
    separate = {"q": module.q_proj_weight, "k": module.k_proj_weight, "v": module.v_proj_weight}
    for part in parts:
        rows = slice(width * "qkv".index(part[0]), width * ("qkv".index(part[-1]) + 1))
        weight: Tensor = separate[part] if module.in_proj_weight is None else module.in_proj_weight
        if module.in_proj_weight is not None and part != "qkv":
            weight = weight[rows]
        held.add_module(_layer_name(module, part), _linear(weight, None if bias is None else bias[rows]))
    held.add_module("out_proj", module.out_proj)
    return held


def _layer_name(module: nn.MultiheadAttention, part: str) -> str:
    """The name of the Linear of a run, after the parameter that holds its weight."""
    if module.in_proj_weight is None:
        return f"{part}_proj"
    return "in_proj" if part == "qkv" else f"in_proj_{part}"


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A Linear with this weight (out, in), copied if it is a part of a parameter, and a copy of this bias (out)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    if not isinstance(weight, nn.Parameter):
        weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    layer.weight = weight
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return layer


def _decompose(node: fx.Node, module: nn.MultiheadAttention, parts: Sequence[str]) -> None:
    """Replaces one call by projections, heads, attention and output layer."""
    name, graph, given = str(node.target), node.graph, _given(node)
    inputs = {key[0]: given[key] for key in ("query", "key", "value")}
    before = set(graph.nodes)
    order = () if module.batch_first else (False,)
    with graph.inserting_before(node):
        projected: list[fx.Node] = []
        for part in parts:
            packed = graph.call_module(f"{name}.{_layer_name(module, part)}", (inputs[part[0]],))
            heads = graph.call_function(split_packed_heads, (packed, len(part), module.num_heads, *order))
            projected += [graph.call_function(operator.getitem, (heads, index)) for index in range(len(part))]
        attended = graph.call_function(F.scaled_dot_product_attention, tuple(projected))
        joined = graph.call_function(join_heads, (attended, *order))
        result = graph.call_module(f"{name}.out_proj", (joined,))
    for new in set(graph.nodes) - before:
        new.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
    for user in list(node.users):
        user.replace_all_uses_with(result)
        graph.erase_node(user)
    graph.erase_node(node)


def split_packed_heads(
    packed: Shaped[Tensor, "... c"], parts: int, heads: int, batch_first: bool = True
) -> tuple[Shaped[Tensor, "... h n d"], ...]:
    """The parts of packed projections, such as query, key and value, each (b, h, n, d).

    `packed` has shape (b, n, parts · h · d), or (n, b, parts · h · d) if not `batch_first`; (n, parts · h · d) without
    a batch. `heads` is the number of heads h.
    """
    separate = packed.unflatten(-1, (parts, heads, -1)).movedim(-3, 0)
    if not batch_first and packed.ndim == 3:
        separate = separate.transpose(1, 2)
    return tuple(separate.transpose(-3, -2).unbind(0))


def join_heads(x: Shaped[Tensor, "... h n d"], batch_first: bool = True) -> Shaped[Tensor, "... c"]:
    """Concatenates heads: (b, h, n, d) -> (b, n, h·d), or (n, b, h·d) if not `batch_first`."""
    joined = x.transpose(-3, -2).flatten(-2)
    return joined if batch_first or x.ndim == 3 else joined.transpose(0, 1)
