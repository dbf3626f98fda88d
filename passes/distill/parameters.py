"""The parameters that a training changes, in groups for the optimizer."""

from typing import Any

from torch import fx, nn

SMALLEST_SIZE = 1e-3  # of a parameter, for its learning rate: a bias of zeros can leave zero


def used_parameters(graph: fx.GraphModule) -> set[str]:
    """The names of the parameters that a node of the graph uses. The modules may have others, which are not trained."""
    used: list[str] = []
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            used.append(str(node.target))
        elif node.op == "call_module":
            used += [f"{node.target}.{name}" for name, _ in graph.get_submodule(str(node.target)).named_parameters()]
    values = {id(value) for name, value in graph.named_parameters(remove_duplicate=False) if name in used}
    return {name for name, value in graph.named_parameters() if id(value) in values}


def weight_decay_groups(graph: fx.GraphModule, weight_decay: float) -> list[dict[str, Any]]:
    """The trained parameters, in one group with weight decay and one without.

    Only weights of layers decay. Biases, norms, and parameters that the graph reads directly, such as class tokens and
    position embeddings, do not.
    """
    fetched = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    layers = {
        f"{name}.weight" for name, m in graph.named_modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)
    }
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in graph.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim > 1 and (name in layers or name not in fetched)
            groups[decayed].append(parameter)
    found = [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]
    return [group for group in found if group["params"]]


def groups_by_size(graph: fx.GraphModule) -> list[dict[str, Any]]:
    """The trained parameters, each in a group of its own whose learning rate is relative to the parameter's size.

    `lr_scale`, which timm's schedules multiply the rate by, is the root mean square of the values that are not zero.
    The weights of layers differ by orders of magnitude, and Adam moves each of them by about the rate in a step.
    """
    groups = []
    for parameter in graph.parameters():
        if parameter.requires_grad:
            values = parameter.detach().double()
            used = values[values != 0]
            size = float(used.square().mean().sqrt()) if len(used) else 0.0
            groups.append({"params": [parameter], "weight_decay": 0.0, "lr_scale": max(size, SMALLEST_SIZE)})
    return groups
