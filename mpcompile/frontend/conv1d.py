"""Rewrites each Conv1d of a graph as a Conv2d of height 1, which masks, kernels and every pass take.

    conv1d(x, w) = squeeze(conv2d(unsqueeze(x, -2), unsqueeze(w, 2)), -2)

torch computes a Conv1d in this way too. The layer keeps its name; its weight (out, in, k) becomes (out, in, 1, k).
Batch normalization, pooling and elementwise operations between two of them are done at height 1 as well, so that a
normalization still directly follows its convolution and exporters fold it, and passes know the pooling.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

ELEMENTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.Dropout,
    nn.Identity,
)  # fmt: skip
ELEMENTWISE_FUNCTIONS = (
    F.relu, F.relu6, F.gelu, F.silu, F.leaky_relu, F.elu, torch.relu, torch.tanh, torch.sigmoid,
    "relu", "tanh", "sigmoid",
)  # fmt: skip
HEIGHT = -2  # the axis of height, also of an unbatched (c, h, w)


def as_two_dimensional(graph: fx.GraphModule) -> None:
    """Rewrites every call of a Conv1d whose weight no other operator reads."""
    fetched = {id(value) for node in graph.graph.nodes if (value := _fetched(graph, node)) is not None}
    weights: dict[int, nn.Parameter] = {}  # the weight of a Conv2d, by the identity of the Conv1d's: they stay tied
    replaced: dict[str, nn.Conv2d] = {}
    squeezes = []
    for node in [node for node in graph.graph.nodes if node.op == "call_module"]:
        name = str(node.target)
        module = graph.get_submodule(name)
        if isinstance(module, nn.Conv1d) and _is_plain(module) and id(module.weight) not in fetched:
            replaced[name] = _two_dimensional(module, weights)
            graph.set_submodule(name, replaced[name])
        if name in replaced:
            squeezes.append(_at_height_one(node))
    for squeeze in squeezes:
        _move_down(graph, squeeze)
    graph.recompile()


def _fetched(graph: fx.GraphModule, node: fx.Node) -> Any:
    """The parameter or buffer that a get_attr node reads, else None."""
    owner, _, field = str(node.target).rpartition(".")
    return getattr(graph.get_submodule(owner), field) if node.op == "get_attr" else None


def _is_plain(module: nn.Conv1d) -> bool:
    """Whether a Conv1d computes nothing besides its convolution."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    kind = type(module)
    if kind.forward is not nn.Conv1d.forward or kind._conv_forward is not nn.Conv1d._conv_forward:
        return False
    return not hooked and isinstance(module._parameters.get("weight"), nn.Parameter)


def _two_dimensional(module: nn.Conv1d, weights: dict[int, nn.Parameter]) -> nn.Conv2d:
    """The Conv2d of height 1; its weight is taken from `weights`, or added there."""
    padding = module.padding if isinstance(module.padding, str) else (0, module.padding[0])
    layer = nn.Conv2d(
        module.in_channels,
        module.out_channels,
        (1, module.kernel_size[0]),
        stride=(1, module.stride[0]),
        padding=padding,
        dilation=(1, module.dilation[0]),
        groups=module.groups,
        bias=module.bias is not None,
        padding_mode=module.padding_mode,
        device="meta",
    )
    own = nn.Parameter(module.weight.detach().unsqueeze(2).clone(), module.weight.requires_grad)
    layer.weight = weights.setdefault(id(module.weight), own)
    layer.bias = module.bias
    return layer.train(module.training)


def _at_height_one(node: fx.Node) -> fx.Node:
    """Adds the axis of height before a call of a Conv2d and removes it after; returns the node that removes it."""
    graph, x = node.graph, node.args[0] if node.args else node.kwargs["input"]
    with graph.inserting_before(node):
        high = graph.call_method("unsqueeze", (x, HEIGHT))
    node.args, node.kwargs = (high,), {}
    with graph.inserting_after(node):
        flat = graph.call_method("squeeze", (node, HEIGHT))
    node.replace_all_uses_with(flat, delete_user_cb=lambda user: user is not flat)
    for new in (high, flat):
        new.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
    return flat


def _move_down(graph: fx.GraphModule, squeeze: fx.Node) -> None:
    """Moves the removal of the height after operations that have a form for height 1, until it meets an unsqueeze."""
    while len(squeeze.users) == 1:
        [user] = squeeze.users
        if user.op == "call_method" and user.target == "unsqueeze" and user.args[1:] == (HEIGHT,):
            user.replace_all_uses_with(squeeze.args[0])  # type: ignore[arg-type]
            graph.graph.erase_node(user)
            graph.graph.erase_node(squeeze)
            return
        module = graph.get_submodule(str(user.target)) if user.op == "call_module" else None
        calls = [node for node in graph.graph.nodes if node.op == "call_module" and node.target == user.target]
        if not user.args or user.args[0] is not squeeze:
            return
        if module is not None and len(calls) == 1 and (high := _at_height(module)) is not None:
            graph.set_submodule(str(user.target), high)
        elif not (isinstance(module, ELEMENTWISE_MODULES) or user.target in ELEMENTWISE_FUNCTIONS):
            return
        user.replace_all_uses_with(squeeze)
        user.replace_input_with(squeeze, squeeze.args[0])  # type: ignore[arg-type]
        squeeze.args = (user, HEIGHT)
        user.append(squeeze)


def _at_height(module: nn.Module) -> nn.Module | None:
    """The module that computes the same at height 1; None if it is of no kind that has one."""
    if module._forward_hooks or module._forward_pre_hooks:
        return None
    if type(module) is nn.BatchNorm1d:
        return _two_dimensional_norm(module)
    if type(module) is nn.MaxPool1d and not module.return_indices:
        sizes = ((1, _number(module.kernel_size)), (1, _number(module.stride)), (0, _number(module.padding)))
        return nn.MaxPool2d(*sizes, dilation=(1, _number(module.dilation)), ceil_mode=module.ceil_mode)
    if type(module) is nn.AvgPool1d:
        sizes = ((1, _number(module.kernel_size)), (1, _number(module.stride)), (0, _number(module.padding)))
        return nn.AvgPool2d(*sizes, module.ceil_mode, module.count_include_pad)
    if type(module) is nn.AdaptiveAvgPool1d:
        return nn.AdaptiveAvgPool2d((1, _number(module.output_size)))
    return None


def _number(size: int | tuple[int, ...]) -> int:
    """A size along the one axis, which torch keeps as a number or as a tuple of one."""
    return size if isinstance(size, int) else size[0]


def _two_dimensional_norm(module: nn.BatchNorm1d) -> nn.BatchNorm2d:
    """A BatchNorm2d with the parameters, buffers and settings of a BatchNorm1d."""
    norm = nn.BatchNorm2d(
        module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats, device="meta"
    )
    norm._parameters, norm._buffers = module._parameters, module._buffers
    return norm.train(module.training)
