"""The inputs of a module: what its forward is called with, by name, and the example that a capture runs."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mpcompile.errors import CaptureError

# Names of the images in signatures that say no more than that; the ONNX file calls this input `images`.
PLAIN_NAMES = frozenset(["x", "input", "inputs", "image", "images", "img", "imgs", "tensor", "data", "batch", "args"])
IMAGES = "images"


@dataclass(frozen=True)
class CallInputs:
    """The input tensors of a module by name, the images first, and how forward takes each.

    `keywords` are the names that forward takes by keyword; the others are positional, in order.
    """

    tensors: Mapping[str, Tensor]
    keywords: frozenset[str] = frozenset()

    def run(self, module: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> Any:
        """What the module returns for these tensors, by default the example's."""
        given = self.tensors if tensors is None else tensors
        positional = [tensor for name, tensor in given.items() if name not in self.keywords]
        return module(*positional, **{name: tensor for name, tensor in given.items() if name in self.keywords})


def call_inputs(module: nn.Module, example: Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]) -> CallInputs:
    """The inputs of a call of `module` with an example: one tensor, a tuple in order, or tensors by forward's names.

    `pixel_values`, which is how Hugging Face models call the images, is passed by keyword wherever it stands. Raises
    CaptureError if forward needs more arguments or has no argument of a given name.
    """
    parameters = inspect.signature(module.forward).parameters
    named = {name: row for name, row in parameters.items() if row.kind not in (row.VAR_POSITIONAL, row.VAR_KEYWORD)}
    if isinstance(example, Mapping):
        unknown = [name for name in example if name not in named and len(named) == len(parameters)]
        if unknown:
            raise CaptureError(
                f"{type(module).__name__}.forward has no argument {unknown[0]!r}; it has {', '.join(named) or 'none'}"
            )
        tensors, keywords = dict(example), frozenset(example)
    elif isinstance(example, tuple):
        names = _positional_names(list(named), len(example))
        tensors, keywords = dict(zip(names, example, strict=True)), frozenset()
    elif "pixel_values" in named:
        tensors, keywords = {"pixel_values": example}, frozenset(["pixel_values"])
    else:
        first = next(iter(named), "x")
        tensors, keywords = {IMAGES if first in PLAIN_NAMES else first: example}, frozenset()
    _require_all(module, named, tensors, keywords)
    return CallInputs(tensors, keywords)


def _positional_names(known: list[str], count: int) -> list[str]:
    """The names of the first `count` arguments; the first is `images` if its own name says no more than that."""
    names = (known + [f"input_{index}" for index in range(len(known), count)])[:count]
    return [IMAGES if names[0] in PLAIN_NAMES and IMAGES not in names[1:] else names[0], *names[1:]]


def _require_all(
    module: nn.Module,
    named: Mapping[str, inspect.Parameter],
    tensors: Mapping[str, Tensor],
    keywords: frozenset[str],
) -> None:
    """Raises CaptureError if an argument without default is missing."""
    positional = len(tensors) - len(keywords)
    missing = [
        name
        for index, (name, row) in enumerate(named.items())
        if row.default is row.empty and name not in keywords and (index >= positional or row.kind is row.KEYWORD_ONLY)
    ]
    if missing:
        raise CaptureError(
            f"{type(module).__name__}.forward also needs {', '.join(missing)}, and the example has "
            f"{', '.join(tensors)} alone; give each further input with --input NAME=SHAPE, such as "
            f"--input {missing[0]}=4, or an example with all of them in Python"
        )
