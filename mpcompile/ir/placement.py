"""Moves graphs and models between devices.

Every tensor moves: parameters, buffers, tensors that modules or the graph keep as constants, and those of the plan. A
graph may name a device itself (`torch.arange(n, device="cpu")`); these names follow.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpcompile.ir.model import LayerPlan, Model


def placed(model: Model, device: torch.device) -> Model:
    """The model on a device. Its graphs are moved in place; tensors that two modules share stay shared."""
    for graph in (model.graph, model.dense):
        if graph is not None:
            place(graph, device)
    return replace(
        model,
        example=model.example.to(device),
        others=tuple(one.to(device) for one in model.others),
        plan={name: _placed_plan(plan, device) for name, plan in model.plan.items()},
    )


@torch.no_grad()
def place(graph: fx.GraphModule, device: torch.device) -> None:
    """Moves a graph in place."""
    seen: dict[int, Tensor] = {}  # by identity, so that ties stay

    def moved(value: Tensor) -> Tensor:
        if value.device == device:
            return value
        if id(value) not in seen:
            there = value.detach().to(device)
            seen[id(value)] = nn.Parameter(there, value.requires_grad) if isinstance(value, nn.Parameter) else there
        return seen[id(value)]

    for module in graph.modules():
        for kept in (module._parameters, module._buffers, module.__dict__):
            for name, value in kept.items():
                if isinstance(value, Tensor):
                    kept[name] = moved(value)  # type: ignore[assignment]
    named = False
    for node in graph.graph.nodes:
        args, kwargs = (_with_device(given, device) for given in (node.args, node.kwargs))
        if "device" in kwargs and isinstance(kwargs["device"], str):
            kwargs = {**kwargs, "device": device}
        if (args, kwargs) != (node.args, node.kwargs):
            node.args, node.kwargs, named = args, kwargs, True
    if named:
        graph.recompile()


def tensors_of(graph: fx.GraphModule) -> Iterator[Tensor]:
    """The parameters and buffers of a graph, and the tensors that its modules keep as constants."""
    for module in graph.modules():
        for kept in (module._parameters, module._buffers, module.__dict__):
            yield from (value for value in kept.values() if isinstance(value, Tensor))


def _with_device(given: Any, device: torch.device) -> Any:
    """Arguments of a node, with every device in them replaced."""
    return fx.node.map_aggregate(given, lambda one: device if isinstance(one, torch.device) else one)


def _placed_plan(plan: LayerPlan, device: torch.device) -> LayerPlan:
    """The plan with its tensors on the device; the plan itself if they are there."""
    kept = (plan.permutation, plan.mask, plan.scale)
    if all(value is None or value.device == device for value in kept):
        return plan
    permutation, mask, scale = (None if value is None else value.to(device) for value in kept)
    return replace(plan, permutation=permutation, mask=mask, scale=scale)
