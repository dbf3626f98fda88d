"""Passes in a process group: all ranks run a pass that shares its work; rank 0 runs the others alone.

Every rank has the same model before each pass and gets rank 0's after it. After a shared pass the ranks compare hashes,
and rank 0 sends its model only if one differs: with unequal processors, sums round differently.
"""

from collections.abc import Callable, Iterator
from dataclasses import fields
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, runtime_checkable

from mpcompile.data.encoded_images import DatasetImages
from mpcompile.data.images import Data, Split
from mpcompile.errors import UsageError
from mpcompile.ir.model import Model
from mpcompile.pipeline.fingerprint import model_key
from mpcompile.system.distributed import PicklableGraph, all_gathered, broadcast, share, together
from mpcompile.system.hashing import sha256

GRAPHS = ("graph", "dense")


@runtime_checkable
class SharesWork(Protocol):
    """A pass that every rank of a process group runs at the same time, with the same model and images. Optional.

    What it shares goes through the functions of mpcompile/system/distributed.py; what it does not, each rank repeats.
    """

    shares_work: ClassVar[bool]


def begin_together(model: Model | None, data: Data) -> bool:
    """Whether the passes run now; rank 0 decides, by passing a model or None, and the other ranks pass theirs.

    Raises UsageError in a rank that has another model or other images than rank 0.
    """
    with together():
        here = share()
        if here.size == 1:
            return model is not None
        splits = (data.calibration, data.validation, data.training, data.held_out)
        images = [repr([split.order for split in splits]), *(name for split in splits for name in _identities(split))]
        own = {} if model is None else {"model": model_key(model), "images": sha256(*images)}
        first = broadcast(own)
        for what in first if not here.first else ():
            if own[what] != first[what]:
                raise UsageError(f"the {what} of this rank differs from rank 0's; give every rank the same files")
        return bool(first)


def _identities(split: Split) -> Iterator[str]:
    """A text for each image of a dataset, of which ranks may have drawn others; nothing for other sets."""
    if isinstance(split.images, DatasetImages):
        yield from (split.images.paths[index].identity() for index in split.order)


def shares_work(step: object) -> bool:
    """Whether all ranks run the pass."""
    return isinstance(step, SharesWork) and step.shares_work


def run_by_ranks(step: object, run: Callable[[], Model], model: Model) -> Model:
    """The model after a pass on every rank. `run` runs it; `model` is what it gets. Without other ranks, `run()`."""
    here = share()
    if here.size == 1:
        return run()
    if shares_work(step):
        result = run()
        if len(set(all_gathered(model_key(result)))) == 1:
            return result
    else:
        with together(False):
            result = run() if here.first else model
    return sent(result)


def sent(model: Model | None) -> Model:
    """Rank 0's model, on every rank. The other ranks may pass None."""
    here = share()
    if here.size == 1:
        assert model is not None
        return model
    packed = None
    if here.first:
        assert model is not None
        packed = {field.name: getattr(model, field.name) for field in fields(model)}
        packed |= {name: packed[name] and PicklableGraph.of(packed[name]) for name in GRAPHS}
        packed["plan"] = dict(packed["plan"])
    values: dict[str, Any] = broadcast(packed)
    if here.first:
        assert model is not None
        return model
    values |= {name: values[name] and values[name].unpacked() for name in GRAPHS}
    return Model(**values | {"plan": MappingProxyType(values["plan"])})
