"""Several processes on one model, as torchrun starts them: who am I, and the same value for all.

The compressing passes run in the first process alone. A pass that trains sends its model to the others, which wait for
it, and all of them train on their share of each batch.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from mpcompile.errors import UsageError

T = TypeVar("T")
PATIENCE = timedelta(days=2)  # the others wait while the first compresses
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torchrun's protocol


@dataclass(frozen=True, slots=True)
class Place:
    """This process among `size` that work together; `rank` counts from 0."""

    rank: int
    size: int

    @property
    def first(self) -> bool:
        """Whether this is the process that compresses and writes."""
        return self.rank == 0


def place() -> Place:
    """Where this process stands: alone, unless `joined`."""
    if not dist.is_available() or not dist.is_initialized():
        return Place(0, 1)
    return Place(dist.get_rank(), dist.get_world_size())


@contextmanager
def joined() -> Iterator[Place]:
    """Inside, the processes that torchrun started together know each other. Raises UsageError."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        yield Place(0, 1)
        return
    missing = [name for name in NEEDED if name not in os.environ]
    if missing:
        raise UsageError(f"WORLD_SIZE is {size}, and {', '.join(missing)} are not set; start it with torchrun")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
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
