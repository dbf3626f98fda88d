"""torch.distributed under torchrun: rank, broadcast, gather and all-reduce. A single process needs no set-up.

The ranks work together only inside `together()`, which the pass manager opens around a pass that shares its work.
There `share()` is this process's share, and the functions below are collective: every rank calls them, in the same
order. Outside, `share()` is all of the work, and they return what they are given.
"""

import copy
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

from mpcompile.errors import MpcompileError, ResourceError, UsageError
from mpcompile.system.device import chosen_device
from mpcompile.system.progress import tracked

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

T = TypeVar("T")
R = TypeVar("R")
WAIT = timedelta(days=2)  # for a rank that still works
ENDED = "mpcompile/ended/"  # key in the group's store, with the rank that ends
OWN = "own"  # what a rank says there that has an error of its own
ENDING_SECONDS = 3.0  # in which every living rank notices that one has ended
LOST_TEXTS = ("connection closed by peer", "connection reset by peer", "broken pipe", "nccl", "socket closed")
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # variables that torchrun sets


class LostRank(SystemExit):
    """Another rank ended and has told why; this one ends without a word."""


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


_together: ContextVar[bool] = ContextVar("together", default=False)


@contextmanager
def together(shared: bool = True) -> Iterator[None]:
    """Within the block, the ranks share the work if `shared`; else each process works alone."""
    token = _together.set(shared)
    try:
        yield
    finally:
        _together.reset(token)


def share() -> ProcessRank:
    """This process's share of the work: its rank inside `together()`, else 0 of 1."""
    return process_rank() if _together.get() else ProcessRank(0, 1)


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
    from torch.distributed.rendezvous import rendezvous

    store, rank, count = next(rendezvous("env://"))
    dist.init_process_group(
        "nccl" if chosen.type == "cuda" else "gloo", store=store, rank=rank, world_size=count, timeout=WAIT
    )
    try:
        yield ProcessRank(rank, count)
    except BaseException as error:
        own = not isinstance(error, SystemExit) and not any(part in str(error).lower() for part in LOST_TEXTS)
        store.set(f"{ENDED}{rank}", OWN if own else "")
        if not own:
            _explain(error, store, rank, count)
        if rank and isinstance(error, MpcompileError):
            raise type(error)(f"rank {rank}: {error}") from error
        raise
    finally:
        dist.destroy_process_group()


def _explain(error: BaseException, store: "TCPStore", rank: int, count: int) -> None:
    """Raises what this rank has to say about an error that is not its own: a signal, or a rank that is gone.

    If another rank ended without a word, the first of the others raises ResourceError. LostRank is raised by the rest,
    and by all if a rank told an error of its own. If all were sent a signal, nothing is raised.
    """
    said = [_ended(store, other) for other in range(count)]
    silent = [other for other, word in enumerate(said) if word is None]
    if silent and rank == said.index(""):
        one = len(silent) == 1
        raise ResourceError(
            f"{'rank' if one else 'ranks'} {', '.join(map(str, silent))} of {count} ended without an error of "
            f"{'its' if one else 'their'} own, as a process does that is killed, for example for memory; see the log "
            "of its machine. Give the same command again to resume"
        ) from error
    if silent or OWN in said or not isinstance(error, SystemExit):
        raise LostRank(1) from error


def _ended(store: "TCPStore", rank: int) -> str | None:
    """What a rank said as it ended: OWN for an error of its own, else ""; None if it says nothing for a few seconds."""
    for _ in range(int(ENDING_SECONDS / 0.1)):
        if store.check([f"{ENDED}{rank}"]):
            return str(store.get(f"{ENDED}{rank}").decode())
        time.sleep(0.1)
    return None


def broadcast(value: T | None) -> T:
    """Rank 0's value, on every rank. The other ranks may pass None."""
    if share().size == 1:
        assert value is not None
        return value
    box = [value if share().first else None]
    dist.broadcast_object_list(box, src=0, device=_device())
    [found] = box
    assert found is not None
    return found


def tensor_of(rank: int, values: Tensor) -> Tensor:
    """A rank's tensor, on every rank and on the device of `values`, which has its shape and type on all of them."""
    if share().size == 1:
        return values
    sent = values.to(_device()).contiguous()
    dist.broadcast(sent, src=rank)
    return sent.to(values.device)


def all_gathered(value: T) -> list[T]:
    """The values of all ranks, in order of rank."""
    here = share()
    if here.size == 1:
        return [value]
    values: list[T] = [value] * here.size
    dist.all_gather_object(values, value)
    return values


def all_reduced(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, on its own device."""
    if share().size == 1:
        return values
    total = values.to(_device(), copy=True)
    dist.all_reduce(total)
    return total.to(values.device)


def largest_of_all(value: float) -> float:
    """The largest value of any rank; NaN if one is NaN."""
    if share().size == 1:
        return value
    unknown = math.isnan(value)
    values = torch.tensor([-math.inf if unknown else value, float(unknown)], dtype=torch.float64, device=_device())
    dist.all_reduce(values, dist.ReduceOp.MAX)
    largest, any_unknown = values.tolist()
    return math.nan if any_unknown else float(largest)


def shared_map(
    function: Callable[[T], R],
    items: Sequence[T],
    label: Callable[[T], str] | None = None,
    unit: str = "steps",
    amount: Callable[[T], int] = lambda item: 1,
) -> list[R]:
    """`function` of each item, in order; each rank computes every size-th item, and all ranks get all results.

    With `label`, this rank's items are reported as steps of progress, with `unit` and `amount` as in `tracked`.
    """
    here = share()
    own_items = items[here.rank :: here.size]
    own = [function(item) for item in (own_items if label is None else tracked(own_items, label, unit, amount))]
    if here.size == 1:
        return own
    by_rank = all_gathered(own)
    return [by_rank[index % here.size][index // here.size] for index in range(len(items))]


def _device() -> torch.device:
    """The device that tensors must be on to be sent."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


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
