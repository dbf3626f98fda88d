"""The inputs of a module: what its forward is called with, by name, and the example that a capture runs."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mpcompile.errors import CaptureError, UsageError, did_you_mean

# Names of the images in signatures that say no more than that; the ONNX file calls this input `images`.
PLAIN_NAMES = frozenset(["x", "input", "inputs", "image", "images", "img", "imgs", "tensor", "data", "batch", "args"])
IMAGES = "images"
HUGGING_FACE_IMAGES = "pixel_values"
TYPES = {"float32": torch.float32, "int64": torch.int64, "int32": torch.int32, "bool": torch.bool}


@dataclass(frozen=True)
class CallInputs:
    """The input tensors of a module by name, the images first, and how forward takes each.

    `keywords` has forward's own name of each input that is passed by keyword; the others are positional, in order.
    """

    tensors: Mapping[str, Tensor]
    keywords: Mapping[str, str] = field(default_factory=dict)

    def run(self, module: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> Any:
        """What the module returns for these tensors, by default copies of the example's, to write into."""
        given = {name: one.clone() for name, one in self.tensors.items()} if tensors is None else tensors
        positional = [tensor for name, tensor in given.items() if name not in self.keywords]
        return module(*positional, **{keyword: given[name] for name, keyword in self.keywords.items()})

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "CallInputs":
        """The same inputs with other tensors."""
        return replace(self, tensors=tensors)


@dataclass(frozen=True, slots=True)
class InputSpec:
    """The shape of an input beside the images, without batch axis, and its type, a key of TYPES."""

    shape: tuple[int, ...]
    dtype: str = "float32"

    @classmethod
    def parse(cls, text: str) -> "InputSpec":
        """`4`, `3x8`, or one of them with a type, such as `16:int64`. Raises UsageError."""
        sizes, colon, dtype = text.partition(":")
        parts = sizes.lower().split("x")
        sized = all(part.isdecimal() and part.isascii() and len(part) < 10 and int(part) for part in parts)
        if not sized or (colon and dtype not in TYPES):
            raise UsageError(
                f"the input {text!r} is not SHAPE or SHAPE:TYPE; give the shape of one image's input, such as 4 or "
                f"3x8, and one of {', '.join(TYPES)}"
            )
        return cls(tuple(map(int, parts)), dtype or "float32")

    def example(self, batch: int) -> Tensor:
        """A batch: standard normal noise if the type is floating-point, else ones."""
        shape, dtype = (batch, *self.shape), TYPES[self.dtype]
        if dtype.is_floating_point:
            return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        return torch.ones(shape, dtype=dtype)


def require_kinds(module: object, example: object, inputs: Mapping[str, object]) -> None:
    """Raises CaptureError for a model that is no module, and for inputs that are no tensors."""
    if not isinstance(module, nn.Module):
        found = f"the class {module.__name__}" if isinstance(module, type) else f"a {type(module).__name__}"
        raise CaptureError(f"the model is {found}; give an nn.Module, whose forward calls what you have")
    if isinstance(example, Mapping):
        named = {**example, **inputs}
    else:
        row = example if isinstance(example, tuple) else () if example is None else (example,)
        named = {**{f"example[{index}]": one for index, one in enumerate(row)}, **inputs}
    for name, one in named.items():
        if not isinstance(one, Tensor):
            raise CaptureError(f"the input {name} is a {type(one).__name__}; give a tensor with a row for each image")
    if isinstance(example, tuple | Mapping) and not example:
        raise CaptureError("the example has no inputs; give a tensor of images (b, c, h, w) first")


def call_inputs(
    module: nn.Module, example: Tensor | tuple[Tensor, ...], others: Mapping[str, Tensor] | None = None
) -> CallInputs:
    """The inputs of a call of `module`.

    Args:
        module: the module.
        example: the images (b, c, h, w), or a tuple of inputs in the order of forward's arguments, the images first.
        others: further inputs by the names of forward's arguments.

    `pixel_values`, which is how Hugging Face models call the images, is passed by keyword wherever it stands. Raises
    CaptureError if forward needs more arguments or has no argument of a given name.
    """
    parameters = inspect.signature(module.forward).parameters
    known = {name: row for name, row in parameters.items() if row.kind not in (row.VAR_POSITIONAL, row.VAR_KEYWORD)}
    takes_any = any(row.kind is row.VAR_KEYWORD for row in parameters.values())
    keywords: dict[str, str] = {}
    if isinstance(example, tuple):
        tensors = dict(zip(_positional_names(list(known), len(example)), example, strict=True))
    elif HUGGING_FACE_IMAGES in known:
        tensors = {HUGGING_FACE_IMAGES: example}
        keywords[HUGGING_FACE_IMAGES] = HUGGING_FACE_IMAGES
    else:
        tensors = {_positional_names(list(known), 1)[0]: example}
    for name, tensor in (others or {}).items():
        if name not in known and not takes_any:
            near = did_you_mean(name, known)
            raise CaptureError(
                f"{type(module).__name__}.forward has no argument {name!r}; it has {', '.join(known) or 'none'}{near}"
            )
        tensors[name] = tensor
        keywords[name] = name
    _require_all(module, known, CallInputs(tensors, keywords))
    return CallInputs(tensors, keywords)


def _positional_names(known: list[str], count: int) -> list[str]:
    """The names of the first `count` arguments; the first is `images` if its own name says no more than that."""
    names = (known + [f"input_{index}" for index in range(len(known), count)])[:count]
    return [IMAGES if names[0] in PLAIN_NAMES and IMAGES not in names[1:] else names[0], *names[1:]]


def _require_all(module: nn.Module, known: Mapping[str, inspect.Parameter], inputs: CallInputs) -> None:
    """Raises CaptureError if an argument without default is missing."""
    by_keyword = set(inputs.keywords.values())
    positional = len(inputs.tensors) - len(by_keyword)
    missing = [
        name
        for index, (name, row) in enumerate(known.items())
        if row.default is row.empty and name not in by_keyword and (index >= positional or row.kind is row.KEYWORD_ONLY)
    ]
    if missing:
        raise CaptureError(
            f"{type(module).__name__}.forward also needs {', '.join(missing)}; give the shape of each further input "
            f"without its batch axis, such as --input {missing[0]}=4, or an example of it in Python: "
            f"capture(module, inputs={{{missing[0]!r}: tensor}})"
        )
