"""Several processes on one model, as torchrun starts them: who am I, and the same value for all.

The compressing passes run in the first process alone. A pass that trains sends its model to the others, which wait for
it, and all of them train on their share of each batch.
"""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

from mpcompile.errors import UsageError

T = TypeVar("T")
BROADCAST_TIMEOUT = timedelta(days=2)  # the others wait while the first compresses
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torchrun's protocol


@dataclass(frozen=True, slots=True)
class ProcessRank:
    """This process among `size` that work together; `rank` counts from 0."""

    rank: int
    size: int

    @property
    def first(self) -> bool:
        """Whether this is the process that compresses and writes."""
        return self.rank == 0


def place() -> ProcessRank:
    """Where this process stands: alone, unless `joined`."""
    if not dist.is_available() or not dist.is_initialized():
        return ProcessRank(0, 1)
    return ProcessRank(dist.get_rank(), dist.get_world_size())


@contextmanager
def joined() -> Iterator[ProcessRank]:
    """Inside, the processes that torchrun started together know each other. Raises UsageError."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        yield ProcessRank(0, 1)
        return
    if not size.isdecimal():
        raise UsageError(f"WORLD_SIZE is {size!r}; it is a number of processes, as torchrun sets it")
    missing = [name for name in NEEDED if name not in os.environ]
    if missing:
        raise UsageError(f"WORLD_SIZE is {size}, and {', '.join(missing)} are not set; start it with torchrun")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=BROADCAST_TIMEOUT)
    try:
        yield place()
    finally:
        dist.destroy_process_group()


def shared(value: T | None) -> T:
    """What the first process gives, in all of them."""
    if place().size == 1:
        assert value is not None
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    [found] = box
    assert found is not None
    return found


def summed(values: Tensor) -> Tensor:
    """The sum of these numbers over all processes."""
    if place().size == 1:
        return values
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = values.to(device, copy=True)
    dist.all_reduce(total)
    return total.to(values.device)


@dataclass(frozen=True)
class Parcel:
    """A graph as it travels: its nodes, and not its code, which would be traced anew and lose what is one node."""

    nodes: fx.Graph
    modules: dict[str, Any]

    @classmethod
    def of(cls, graph: fx.GraphModule) -> "Parcel":
        """The graph, ready to be pickled."""
        # A copy, since the graph itself holds on to its module and would take that along as code.
        return cls(
            copy.deepcopy(graph.graph), {kind: graph.__dict__[kind] for kind in ("_modules", "_parameters", "_buffers")}
        )

    def opened(self) -> fx.GraphModule:
        """The same graph over the same modules, in their order."""
        root = nn.Module()
        root.__dict__.update(self.modules)
        graph = fx.GraphModule(root, self.nodes)
        graph.__dict__.update(self.modules)
        return graph
