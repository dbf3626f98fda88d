"""How a model calls one of its parts: the tensors that differ for each image, and the constant rest of the call."""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpcompile.errors import CaptureError
from mpcompile.ir.output_tree import flattened, other_values, rebuilt

PLAIN = bool | int | float | str


@dataclass(frozen=True)
class Recorded:
    """One call of a part: its arguments with a Slot in place of each tensor, and copies of these tensors by path."""

    tree: Any
    tensors: tuple[tuple[str, Tensor], ...]

    @classmethod
    def of(cls, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> "Recorded":
        """A record of these arguments. The part may write into them, so the tensors are copied."""
        tree, tensors = flattened((args, dict(keywords)))
        return cls(tree, tuple((path, tensor.detach().clone()) for path, tensor in tensors))


@dataclass(frozen=True)
class PartCall:
    """The call of a part in the model around it.

    Attributes:
        part: qualified name of the part.
        tree: positional and keyword arguments, with a Slot in place of each tensor.
        constants: each tensor of the call that is the same for every image; None for one that is not.
        names: the names of the others, which are the inputs of the part: those of forward's arguments.
    """

    part: str
    tree: Any
    constants: tuple[Tensor | None, ...]
    names: tuple[str, ...]

    def inputs_in(self, call: Recorded) -> tuple[Tensor, ...]:
        """The inputs in a recorded call. Raises CaptureError if it has another number of tensors than this one."""
        if len(call.tensors) != len(self.constants):
            raise CaptureError(
                f"--submodule {self.part}: it is called with {len(self.constants)} tensors for some images and with "
                f"{len(call.tensors)} for others; give a part that always gets the same number"
            )
        return tuple(
            tensor for (_, tensor), constant in zip(call.tensors, self.constants, strict=True) if constant is None
        )

    def arguments(self, inputs: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of a call with these inputs."""
        given = iter(inputs)
        tensors = [next(given) if constant is None else constant for constant in self.constants]
        args, keywords = rebuilt(self.tree, tensors)
        return args, keywords


def call_of(part: nn.Module, name: str, call: Recorded, other: Recorded, images: tuple[int, int]) -> PartCall:
    """The call of a part, from its calls on two batches with other images, of these numbers of images.

    A tensor is an input if its first axis has the batch size both times, and a constant if it is the same both times.
    Raises CaptureError for any other tensor, and for other values that differ.
    """
    strange = [type(value).__name__ for value in other_values(call.tree) if not isinstance(value, PLAIN)]
    if [path for path, _ in call.tensors] != [path for path, _ in other.tensors] or not _equal(call.tree, other.tree):
        what = f" of type {strange[0]}" if strange else ""
        raise CaptureError(
            f"--submodule {name}: it is called with values{what} that change from image to image and are no tensors; "
            "give a part whose inputs are tensors with one row for each image"
        )
    constants: list[Tensor | None] = []
    for (path, one), (_, two) in zip(call.tensors, other.tensors, strict=True):
        if _rows(one) == images[0] and _rows(two) == images[1] and one.shape[1:] == two.shape[1:]:
            constants.append(None)
        elif one.shape == two.shape and torch.equal(one, two):
            constants.append(one)
        else:
            raise CaptureError(
                f"--submodule {name}: its input {_name(part, path)} has shape {tuple(one.shape)} for {images[0]} "
                f"images and {tuple(two.shape)} for {images[1]}; give a part whose inputs have one row for each image"
            )
    names = [_name(part, path) for (path, _), constant in zip(call.tensors, constants, strict=True) if constant is None]
    if not names:
        raise CaptureError(f"--submodule {name}: none of its inputs depends on the images; give another part")
    return PartCall(name, call.tree, tuple(constants), tuple(names))


def _equal(one: Any, two: Any) -> bool:
    try:
        return bool(one == two)
    except (TypeError, ValueError, RuntimeError):  # arrays, and objects that refuse a comparison
        return False


def _rows(tensor: Tensor) -> int:
    return len(tensor) if tensor.ndim else 0


def _name(part: nn.Module, path: str) -> str:
    """The name of an input, such as `x` or `features_0`, from its path in a call, such as `0.0` or `1.features.0`."""
    kind, key, *rest = path.split(".")
    if kind == "0":
        rows = inspect.signature(part.forward).parameters.values()
        positional = [row.name for row in rows if row.kind in (row.POSITIONAL_ONLY, row.POSITIONAL_OR_KEYWORD)]
        key = positional[int(key)] if int(key) < len(positional) else f"input_{key}"
    return re.sub(r"\W", "_", "_".join([key, *rest]))


class Holder(nn.Module):
    """A part under its qualified name, alone: its forward takes the inputs of the part and nothing else.

    Its layers have the names that they have in the whole model. Made by `held`.
    """

    def __init__(self, part: nn.Module, call: PartCall) -> None:
        super().__init__()
        self._mpcompile_call = call
        *around, last = call.part.split(".")
        parent: nn.Module = self
        for name in around:
            parent.add_module(name, nn.Module())
            parent = parent.get_submodule(name)
        parent.add_module(last, part)
        self.train(part.training)


def held(part: nn.Module, call: PartCall) -> nn.Module:
    """A module with the part in it, and a forward whose arguments are the inputs of the part by name."""
    rows = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", *call.names)]
    signature = inspect.Signature(rows)

    def forward(self: Holder, *args: Tensor, **keywords: Tensor) -> Any:
        given = dict(zip(call.names, args, strict=False)) | keywords
        positional, named = self._mpcompile_call.arguments([given[name] for name in call.names])
        return self.get_submodule(call.part)(*positional, **named)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    # A class of its own, named as the part's: capture reads the signature, and errors show the name.
    kind = type(type(part).__name__, (Holder,), {"forward": forward})
    holder: nn.Module = kind(part, call)
    return holder
