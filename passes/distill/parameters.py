"""The parameters that a training changes, in groups for the optimizer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

SMALLEST_SIZE = 1e-3  # of a parameter: a bias of zeros can leave zero
SMALLEST_ROW = 1e-2  # of a row, relative to the whole parameter: a row of zeros can leave zero


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


class RelativeSteps:
    """Makes the steps of an optimizer relative to the size of each weight's row, so that one rate fits all layers.

    Adam moves every value by about the rate. But rows of a layer differ by orders of magnitude where a normalization
    follows, and such a step destroys the small ones. So after each step of the optimizer, the change of a value is
    multiplied by the root mean square of the row's values that are not zero: of its output channel for weights, of
    the whole parameter for biases. This is exact for optimizers whose step does not depend on the values, as Adam
    without weight decay.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        """Takes the sizes of the trained parameters as they are now."""
        self._sizes = [
            (parameter, _size(parameter.detach(), by_row=parameter.ndim > 1 or name.endswith("weight")))
            for name, parameter in graph.named_parameters()
            if parameter.requires_grad
        ]

    @torch.no_grad()
    def take(self, step: Callable[[], object]) -> None:
        """Runs `step`, which changes the parameters, and scales its changes."""
        before = [parameter.clone() for parameter, _ in self._sizes]
        step()
        for (parameter, size), old in zip(self._sizes, before, strict=True):
            parameter.copy_(old + size * (parameter - old))


def _size(values: Tensor, by_row: bool) -> Tensor:
    """The root mean square of the values that are not zero, by row or of all, broadcastable to the values."""
    whole = _root_mean_square(values.reshape(1, -1)).clamp_min(SMALLEST_SIZE)
    if not by_row:
        return whole.reshape([1] * values.ndim)
    rows = _root_mean_square(values.reshape(len(values), -1))
    return torch.maximum(rows, SMALLEST_ROW * whole).reshape(-1, *[1] * (values.ndim - 1))


def _root_mean_square(rows: Tensor) -> Tensor:
    """Of the values of each row that are not zero; 0 for a row of zeros."""
    return (rows.double().square().sum(1) / (rows != 0).sum(1).clamp_min(1)).sqrt().to(rows.dtype)
