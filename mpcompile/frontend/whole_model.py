"""A model around one of its parts: it runs up to the part, or whole with another part in its place."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpcompile.errors import CaptureError
from mpcompile.frontend.call_inputs import call_inputs
from mpcompile.frontend.capture_refusals import copy_refusal
from mpcompile.frontend.part_call import PartCall, Recorded, call_of, held
from mpcompile.frontend.plain_copy import copied, wrapped
from mpcompile.frontend.submodule import candidates, submodule_named
from mpcompile.ir.model import Model
from mpcompile.ir.output_tree import flattened, rebuilt
from mpcompile.ir.parity import relative_difference

log = logging.getLogger(__name__)

# Relative difference of the whole model's outputs. The part differs by 1e-5 at most; layers behind it can amplify that.
PUT_BACK_DRIFT = 1e-3


class _ReachedError(Exception):
    """Ends a run of a model at its part."""


@dataclass(frozen=True)
class Whole:
    """A copy of a model in evaluation mode, and how it calls the part that is compressed.

    Attributes:
        module: the copy.
        call: how it calls the part.
        images_as_list: whether it takes a list of images (c, h, w) instead of a batch.
        by_batch: whether each of its outputs has one row for each image, so that images can be run in batches.
        layers_before: whether it runs layers with weights before the part; `layers_after` behind it.
    """

    module: nn.Module
    call: PartCall
    images_as_list: bool
    by_batch: bool
    layers_before: bool
    layers_after: bool

    @property
    def part(self) -> nn.Module:
        """The part, with its dense weights."""
        return self.module.get_submodule(self.call.part)

    @torch.no_grad()
    def run(self, images: Tensor) -> Any:
        """What the dense model returns for images (b, c, h, w)."""
        return _run(self.module, images, self.images_as_list)

    @torch.no_grad()
    def part_inputs(self, images: Tensor) -> tuple[Tensor, ...]:
        """The inputs that the part gets for images (b, c, h, w). The model is run up to the part."""
        found: list[Recorded] = []

        def stop(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            found.append(Recorded.of(args, keywords))
            raise _ReachedError

        handle = self.part.register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
        try:
            self.run(images)
        except _ReachedError:
            pass
        finally:
            handle.remove()
        return self.call.inputs_in(found[0])

    def held_part(self) -> nn.Module:
        """A module whose forward takes the inputs of the part alone, and whose layers have the model's names."""
        return held(self.part, self.call)

    @torch.no_grad()
    def run_with(self, model: Model, images: Tensor) -> Any:
        """What the model returns for images (b, c, h, w) with a captured model in place of the part."""

        def replacement(*args: Any, **keywords: Any) -> Any:
            _, tensors = flattened((args, keywords))
            inputs = self.call.inputs_in(Recorded(None, tensors))
            return rebuilt(model.output_tree, model.outputs(inputs))

        part: Any = self.part
        part.forward = replacement  # on this instance; its other attributes may be read by the model around it
        try:
            return self.run(images)
        finally:
            del part.forward

    def require_put_back(self, model: Model, images: Tensor) -> None:
        """Raises CaptureError unless the model runs with the captured dense part in its place, with the same outputs.

        Outputs without a row for each image are not compared: the order of equal boxes may depend on rounding.
        """
        kind, wanted = type(self.module).__name__, self.run(images)
        try:
            found = self.run_with(model, images)
        except Exception as error:
            raise CaptureError(
                f"--submodule {self.call.part}: {kind} does not run with the captured part in its place: {error}; give "
                f"another part: {candidates(self.module)}"
            ) from error
        if not self.by_batch:
            return
        for (name, one), (_, two) in zip(flattened(wanted)[1], flattened(found)[1], strict=True):
            moved = relative_difference(one.double().numpy(force=True), two.double().numpy(force=True))
            if moved > PUT_BACK_DRIFT:
                raise CaptureError(
                    f"--submodule {self.call.part}: with the captured part in its place, the output {name or 'logits'} "
                    f"of {kind} differs by {moved:.1e} of its size; {PUT_BACK_DRIFT:.0e} is allowed. Its forward "
                    f"probably uses the part beside the call; give another part: {candidates(self.module)}"
                )

    @torch.no_grad()
    def time_share(self, images: Tensor, runs: int = 5) -> float:
        """The median share of a run's time in PyTorch that the part takes, in [0, 1]."""
        shares, began, spent = [], 0.0, 0.0

        def enter(*_: Any) -> None:
            nonlocal began
            began = time.perf_counter()

        def leave(*_: Any) -> None:
            nonlocal spent
            spent = time.perf_counter() - began

        handles = self.part.register_forward_pre_hook(enter), self.part.register_forward_hook(leave)
        try:
            self.run(images)  # the first run is slower
            for _ in range(runs):
                start = time.perf_counter()
                self.run(images)
                shares.append(spent / (time.perf_counter() - start))
        finally:
            for handle in handles:
                handle.remove()
        return sorted(shares)[runs // 2]


def open_whole(module: nn.Module, pattern: str, images: Tensor, others: Tensor) -> Whole:
    """The model with the part that a shell pattern names, from runs on two batches of other sizes with other images.

    The module is not changed. Raises UsageError if the pattern names no part, and CaptureError if the model does not
    run, does not call the part once, or gives it inputs that cannot be compressed with.
    """
    while (inner := wrapped(module)) is not None:
        module = inner
    name = submodule_named(module, pattern)
    types = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
    dtype = torch.float64 if torch.float64 in types else torch.float32
    try:
        module = copied(module).eval().to(dtype)
    except Exception as error:
        raise CaptureError(copy_refusal(module, error)) from error
    images, others = images.to(dtype), others.to(dtype)
    as_list = _takes_list(module, images)
    calls: list[tuple[Recorded, ...]] = []
    batched = True
    for batch in (images, others, images):
        recorded, outputs, around = _recorded_run(module, name, batch, as_list)
        if len(recorded) != 1:
            times = f"called {len(recorded)} times" if recorded else "never called"
            raise CaptureError(
                f"--submodule {name} is {times} in a run of {type(module).__name__}; give a part that is called once: "
                f"{candidates(module)}"
            )
        calls.append(recorded)
        batched = batched and all(t.ndim and len(t) == len(batch) for _, t in flattened(outputs)[1])
    [first], [other], [again] = calls
    call = call_of(module.get_submodule(name), name, first, other, (len(images), len(others)))
    pairs = zip(call.inputs_in(first), call.inputs_in(again), strict=True)
    if any(not torch.equal(one, two) for one, two in pairs):
        raise CaptureError(
            f"--submodule {name} gets other inputs when the same images are run again; {type(module).__name__} "
            "probably draws random numbers in evaluation mode, or keeps state between calls"
        )
    whole = Whole(module, call, as_list, batched, *around)
    log.debug("%s gets %s", name, ", ".join(call.names))
    return whole


def _takes_list(module: nn.Module, images: Tensor) -> bool:
    """Whether a model takes a list of images; a batch is tried first. Raises CaptureError if it takes neither."""
    kind = type(module).__name__
    try:
        with torch.no_grad():
            _run(module, images, False)
    except CaptureError:
        raise
    except Exception as error:
        try:
            with torch.no_grad():
                _run(module, images, True)
        except Exception:
            raise CaptureError(
                f"{kind} runs neither on a batch of shape {tuple(images.shape)} nor on a list of such images: {error}. "
                "If it was trained on another shape, give that with --input-size"
            ) from error
        log.warning("%s does not take a batch; it gets a list of images", kind)
        return True
    return False


def _run(module: nn.Module, images: Tensor, as_list: bool) -> Any:
    """What a model returns for images (b, c, h, w)."""
    copied = images.clone()  # forward may write into its inputs
    return module(list(copied)) if as_list else call_inputs(module, copied).run(module)


def _recorded_run(
    module: nn.Module, name: str, images: Tensor, as_list: bool
) -> tuple[tuple[Recorded, ...], Any, tuple[bool, bool]]:
    """The calls of a part in one run, the outputs, and whether layers with weights ran before and after the part."""
    calls: list[Recorded] = []
    around = [False, False]

    def record(part: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        calls.append(Recorded.of(args, keywords))

    def note(layer: nn.Module, args: tuple[Any, ...]) -> None:
        around[1 if calls else 0] = True

    layers = [
        other
        for other_name, other in module.named_modules()
        if not f"{other_name}.".startswith(f"{name}.")
        and any(weight.ndim > 1 for weight in other.parameters(recurse=False))
    ]
    with torch.no_grad(), _hooked(module.get_submodule(name), layers, record, note):
        outputs = _run(module, images, as_list)
    return tuple(calls), outputs, (around[0], around[1])


@contextmanager
def _hooked(
    part: nn.Module, layers: list[nn.Module], record: Callable[..., Any], note: Callable[..., Any]
) -> Iterator[None]:
    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    handles.append(part.register_forward_pre_hook(record, prepend=True, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
