"""Checks of a capture: the module's outputs are finite and repeatable, and the graph gives the same ones."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpcompile.errors import CaptureError
from mpcompile.frontend.call_inputs import CallInputs
from mpcompile.frontend.recorder import SOURCE_LINE
from mpcompile.frontend.source_lines import with_code
from mpcompile.frontend.submodule import suggestion
from mpcompile.ir.batch import all_outputs
from mpcompile.ir.model import Model
from mpcompile.ir.output_tree import flattened, other_values
from mpcompile.ir.parity import relative_difference
from mpcompile.ir.shapes import run_example

log = logging.getLogger(__name__)

# Largest relative difference: the graph runs the same operators on the same values; only a fused kernel that is
# decomposed in the graph can round differently.
CAPTURE_DRIFT = 1e-5
OTHER_BATCH = 3  # the example has 2 images


def checked_outputs(module: nn.Module, inputs: CallInputs) -> tuple[Tensor, ...]:
    """The module's output tensors in the order of its own tree. Raises CaptureError unless they are usable."""
    return _checked_tree(module, inputs)[1]


def _checked_tree(module: nn.Module, inputs: CallInputs) -> tuple[Any, tuple[Tensor, ...]]:
    """The tree of the module's outputs, and their tensors. Raises CaptureError unless they are usable."""
    kind = type(module).__name__
    shapes = " and ".join(str(tuple(one.shape)) for one in inputs.tensors.values())
    try:
        with torch.no_grad():
            outputs = inputs.run(module)
    except Exception as error:
        raise CaptureError(
            f"{kind} does not run on a batch of shape {shapes} alone: {error}. {_remedy(module, inputs)}"
        ) from error
    tree, tensors = flattened(outputs)
    strange = [value for value in other_values(tree) if not isinstance(value, bool | int | float | str)]
    if strange or not tensors:
        raise CaptureError(
            f"{kind} returns {type(strange[0] if strange else outputs).__name__}; outputs are tensors, and tuples, "
            "lists, dicts and dataclasses of them. Wrap it in a module whose forward returns these"
        )
    images = len(next(iter(inputs.tensors.values())))
    for name, each in tensors:
        if each.is_floating_point() and not each.isfinite().all():
            raise CaptureError(
                f"{kind} returns numbers that are not finite{f' in {name}' if name else ''}; check its weights for "
                "NaN and infinity"
            )
    one = tensors[0][1]
    if len(tensors) == 1 and (one.ndim < 2 or len(one) != images or not one.numel()):
        raise CaptureError(
            f"{kind} returns a tensor of shape {tuple(one.shape)} for a batch of {images}; "
            "it must return one row of outputs for each image"
        )
    if one.ndim and len(one) > 1 and torch.equal(one, one[:1].expand_as(one)):
        log.warning("%s returns the same outputs for every image, so a comparison of outputs proves little", kind)
    return tree, tuple(one for _, one in tensors)


def require_repeatable(module: nn.Module, inputs: CallInputs, outputs: Sequence[Tensor]) -> None:
    """Raises CaptureError if a second run on the same images gives other outputs.

    Every later check compares outputs, so that a pass would be blamed for the model's noise.
    """
    state = torch.get_rng_state()
    again = checked_outputs(module, inputs)
    moved = _difference(outputs, again)
    if moved == 0:
        if not torch.equal(state, torch.get_rng_state()):
            log.warning("%s draws random numbers in evaluation mode; its outputs did not change", type(module).__name__)
        return
    raise CaptureError(
        f"{type(module).__name__} gives other outputs when the same images are run again: they differ by {moved:.1e} "
        "of their size. It probably draws random numbers in evaluation mode, or keeps state between calls; make "
        "forward the same for the same images when module.training is False"
    )


def require_same(model: Model, reference: nn.Module, inputs: CallInputs, order: Sequence[int]) -> None:
    """Raises CaptureError if graph and module differ on the example, or on other images in another batch size.

    `order` has, for each output of the graph, its number among the module's outputs.
    """
    tree, expected = _checked_tree(reference, inputs)
    _compare([expected[index] for index in order], model.graph, model.example_inputs)
    run_example(model)  # records shapes
    _require_same_on_one(model, reference, inputs, order)
    other = other_inputs(inputs, OTHER_BATCH)
    other_tree, wanted = _checked_tree(reference, other)
    if len(wanted) != len(order):
        raise CaptureError(
            f"{type(reference).__name__} returns {len(order)} tensors for {len(model.example)} images and "
            f"{len(wanted)} for {OTHER_BATCH}; a graph has one number of outputs{_part_instead(reference)}"
        )
    for value, another in zip(other_values(tree), other_values(other_tree), strict=False):
        if value != another:
            raise CaptureError(
                f"{type(reference).__name__} returns {value!r} beside its tensors for {len(model.example)} images and "
                f"{another!r} for {OTHER_BATCH}; a graph returns the same value for all. Return a tensor instead"
            )
    found = tuple(other.tensors.values())
    _compare([wanted[index] for index in order], model.graph, found)


def _require_same_on_one(model: Model, reference: nn.Module, inputs: CallInputs, order: Sequence[int]) -> None:
    """Raises CaptureError if graph and module differ on one image; passes if the module does not take one alone.

    `if len(x) > 1` is decided by the example, which has more, and models are deployed on single images.
    """
    alone = other_inputs(inputs, 1)
    try:
        wanted = checked_outputs(reference, alone)
    except CaptureError as refused:
        log.info("%s was not compared on one image: %s", type(reference).__name__, refused)
        return
    if len(wanted) == len(order):
        found = tuple(alone.tensors.values())
        _compare([wanted[index] for index in order], model.graph, found)


def _remedy(module: nn.Module, inputs: CallInputs) -> str:
    """What to do with a module that does not run on a batch."""
    images = next(iter(inputs.tensors.values()))
    try:
        with torch.no_grad():
            module(list(images))
    except Exception:
        return "If it was trained on another shape, give that with --input-size"
    return f"It takes a list of images, and a graph takes a batch{_part_instead(module)}"


def _part_instead(module: nn.Module) -> str:
    """The end of an error about a module whose large part could be compressed; empty if it has none."""
    part = suggestion(module)
    return f". {part[0].upper()}{part[1:]}" if part else ""


def other_inputs(inputs: CallInputs, batch: int) -> CallInputs:
    """Inputs of another batch size with other values; tensors that are not floating-point repeat their rows."""
    generator = torch.Generator().manual_seed(1)

    def another(tensor: Tensor) -> Tensor:
        if tensor.ndim == 0:
            return tensor
        if tensor.is_floating_point():
            return torch.randn(batch, *tensor.shape[1:], generator=generator).to(tensor.dtype)
        return tensor[torch.arange(batch) % len(tensor)]

    return inputs.with_tensors({name: another(tensor) for name, tensor in inputs.tensors.items()})


def _compare(wanted: Sequence[Tensor], graph: fx.GraphModule, inputs: tuple[Tensor, ...]) -> None:
    """Raises CaptureError unless the graph's outputs are the wanted ones."""
    images = len(inputs[0])
    interpreter = _Watched(graph)
    try:
        with torch.no_grad():
            found = all_outputs(interpreter.run(*(one.clone() for one in inputs)))
    except Exception as error:
        line = f" At {with_code(interpreter.failing)}." if interpreter.failing else ""
        raise CaptureError(
            f"the captured graph does not run on a batch of {images}: {str(error).splitlines()[0]}.{line} Its forward "
            "probably computes a size from the batch size in floating point, loops over images, or keeps state from "
            "an earlier run; write that line with integer sizes of the tensor"
        ) from error
    shapes = [" and ".join(str(tuple(one.shape)) for one in outputs) for outputs in (wanted, found)]
    if shapes[0] != shapes[1]:
        raise CaptureError(
            f"the captured graph returns {shapes[1]} for a batch of {images}, and the module {shapes[0]}. Its forward "
            "probably loops over images, or uses torch.vmap; call torch functions on the whole batch"
        )
    difference = _difference(wanted, found)
    if difference > CAPTURE_DRIFT:
        raise CaptureError(
            f"the captured graph computes something else: outputs on a batch of {images} differ by "
            f"{difference:.1e} of the largest output; {CAPTURE_DRIFT:.0e} is allowed. Its forward probably uses "
            "values that left torch (a compiled extension, a cached tensor), branches on the batch size or computes "
            "with it in floating point, or opens torch.autocast"
        )


def _difference(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """The largest relative difference of two rows of outputs; infinite if their shapes differ."""
    if [one.shape for one in wanted] != [one.shape for one in found]:
        return float("inf")
    pairs = zip(wanted, found, strict=True)
    return max(
        relative_difference(one.double().numpy(force=True), two.double().numpy(force=True)) for one, two in pairs
    )


class _Watched(fx.Interpreter):
    """Runs a graph and keeps the line of model code whose node fails; a call of the graph would print it."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.extra_traceback = False
        self.failing: str | None = None

    def run_node(self, n: fx.Node) -> Any:
        """The node's result."""
        try:
            return super().run_node(n)
        except Exception:
            self.failing = n.meta.get(SOURCE_LINE)
            raise
