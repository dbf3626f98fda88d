"""torch.distributed under torchrun: rank, broadcast and all-reduce. A single process needs no set-up.

Rank 0 runs the compressing passes alone. A pass that trains broadcasts its model to the other ranks, which wait for it;
then each rank trains on its share of every batch.
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
from mpcompile.system.device import chosen_device

T = TypeVar("T")
BROADCAST_TIMEOUT = timedelta(days=2)  # the other ranks wait while rank 0 compresses
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # variables that torchrun sets


@dataclass(frozen=True, slots=True)
class ProcessRank:
    """The rank of this process, from 0, and the number of processes."""

    rank: int
    size: int

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which compresses and writes."""
        return self.rank == 0


def process_rank() -> ProcessRank:
    """The rank of this process: 0 of 1 outside `process_group()`."""
    if not dist.is_available() or not dist.is_initialized():
        return ProcessRank(0, 1)
    return ProcessRank(dist.get_rank(), dist.get_world_size())


@contextmanager
def process_group(device: str = "auto") -> Iterator[ProcessRank]:
    """Initialises the process group of torchrun, and destroys it at the end. Does nothing for a single process.

    `device` is the recipe's: tensors are sent by NCCL between GPUs, else by Gloo.

    Raises UsageError if torchrun's variables are incomplete.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        yield ProcessRank(0, 1)
        return
    if not size.isdecimal():
        raise UsageError(f"WORLD_SIZE is {size!r}; it must be the number of processes, as torchrun sets it")
    missing = [name for name in NEEDED if name not in os.environ]
    if missing:
        raise UsageError(f"WORLD_SIZE is {size}, and {', '.join(missing)} are not set; start it with torchrun")
    chosen = chosen_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=BROADCAST_TIMEOUT)
    try:
        yield process_rank()
    finally:
        dist.destroy_process_group()


def broadcast(value: T | None) -> T:
    """Rank 0's value, on every rank. The other ranks pass None."""
    if process_rank().size == 1:
        assert value is not None
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    [found] = box
    assert found is not None
    return found


def all_reduced(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, on its own device."""
    if process_rank().size == 1:
        return values
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = values.to(device, copy=True)
    dist.all_reduce(total)
    return total.to(values.device)


@dataclass(frozen=True)
class PicklableGraph:
    """A picklable torch.fx graph.

    Pickling a GraphModule re-traces its code, which would inline our wrapped functions (token merging, attention
    heads).
    """

    nodes: fx.Graph
    modules: dict[str, Any]

    @classmethod
    def of(cls, graph: fx.GraphModule) -> "PicklableGraph":
        """The graph in picklable form."""
        # A copy: the original graph refers to its GraphModule, which would be pickled as code.
        return cls(
            copy.deepcopy(graph.graph), {kind: graph.__dict__[kind] for kind in ("_modules", "_parameters", "_buffers")}
        )

    def unpacked(self) -> fx.GraphModule:
        """The GraphModule with the same nodes and modules, in the same order."""
        root = nn.Module()
        root.__dict__.update(self.modules)
        graph = fx.GraphModule(root, self.nodes)
        graph.__dict__.update(self.modules)
        return graph
