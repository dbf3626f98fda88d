"""Bounds the memory of a program before it runs: a number in a file must not fill the machine."""

import contextlib
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from mpcompile.frontend.exported.program import Program
from mpcompile.frontend.exported.refusal import ProgramRefused

LARGEST = 2**28  # values of one result: 1 GB in float32; a ViT-L on 8 images has 2**23 in its largest


def require_moderate_sizes(program: Program) -> None:
    """Raises ProgramRefused if a result of the program has more than LARGEST values.

    Shapes are computed without values. An operator that cannot do that ends the check.
    """
    with contextlib.suppress(NotImplementedError, RuntimeError, TypeError, IndexError, ValueError, AttributeError):
        _Shapes(program).run()


class _Shapes:
    """Runs a graph of operators on tensors without values."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.values: dict[fx.Node, Any] = {}

    def run(self) -> None:
        inputs = iter(self.program.inputs)
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                given = next(inputs)
                empty = None if given.shape is None else torch.empty(given.shape, dtype=given.dtype, device="meta")
                self.values[node] = given.constant if empty is None else empty
            elif node.op == "get_attr":
                self.values[node] = self.program.tensors[str(node.target)].to("meta")
            elif node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), self.values.__getitem__)
                args, kwargs = tree_map(_without_device, (args, kwargs))
                self.values[node] = node.target(*args, **kwargs)
                if any(isinstance(leaf, Tensor) and leaf.numel() > LARGEST for leaf in tree_leaves(self.values[node])):
                    raise ProgramRefused(f"computes a result of more than {LARGEST:,} values ({node.target})")


def _without_device(value: Any) -> Any:
    return torch.device("meta") if isinstance(value, torch.device) else value
