"""A device beside the CPU, for tests: its tensors compute what the CPU computes, and refuse to be mixed with others.

It is PyTorch's device type for out-of-tree accelerators, with a backend in Python. As on a GPU, an operation on a
tensor of this device and one on the CPU fails (unless the latter has no axes, or is an index), and `numpy()` fails
without `force`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("second_device")
OTHER = torch.device("second_device", 0)
MOVES = ("_to_copy", "copy_")
RESHAPES_IN_PLACE = ("squeeze_", "unsqueeze_", "t_.", "transpose_")
TAKES_INDEX = ("index.", "index_put", "_index_put")


class Held(Tensor):
    """A tensor of the other device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Held":
        made: Held = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=OTHER, requires_grad=held.requires_grad,
        )  # fmt: skip
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _computed(func, args, kwargs or {})

    def numpy(self, *, force: bool = False) -> NDArray[Any]:
        if not force:
            raise TypeError(f"can't convert {OTHER} device type tensor to numpy")
        return np.array(self.detach().cpu().numpy())

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{self.held!r} on {self.device}"

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Held":
        copied = Held(self.held.detach().clone())
        copied.requires_grad_(self.requires_grad)
        copied._is_param = getattr(self, "_is_param", False)  # an nn.Parameter
        memo[id(self)] = copied
        return copied


class _Calls(TorchDispatchMode):
    """Sees also the calls that name the device and have no tensor of it, such as torch.zeros(2, device=OTHER)."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _computed(func, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """Makes tensors from Python values, which PyTorch fills through a memory address that this device has not."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and given.get("device") is not None:
            device = given.pop("device")
            return func(*args, **given).to(device)
        return func(*args, **given)


@contextmanager
def other_device() -> Iterator[torch.device]:
    """Within the context, tensors can be made on the device and moved to it."""
    with _Literals(), _Calls():  # type: ignore[no-untyped-call]
        yield OTHER


def _computed(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The result of an operation, on the device where a GPU would have it. Raises RuntimeError if devices are mixed."""
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    there = [one for one in tensors if isinstance(one, Held)]
    here = [one for one in tensors if not isinstance(one, Held)]
    name = func.__name__
    if there and any(one.ndim for one in here) and not name.startswith((*MOVES, *TAKES_INDEX)):
        shapes = [tuple(one.shape) for one in here]
        raise RuntimeError(f"{func}: expected all tensors on {OTHER}, found some on the CPU, of shapes {shapes}")
    generator = kwargs.get("generator")
    device = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    if generator is not None and (there or (device is not None and device.type == OTHER.type)):
        raise RuntimeError(f"{func}: expected a generator of {OTHER}, found one of the CPU")
    inner_args, inner = tree_map(lambda one: one.held if isinstance(one, Held) else one, (args, dict(kwargs)))
    if device is not None:
        inner["device"] = torch.device("cpu")
    result = func(*inner_args, **inner)
    if there and name.startswith(RESHAPES_IN_PLACE):
        with torch._C._DisableTorchDispatch():
            func(*args, **kwargs)  # the shape of the tensor itself
    if name.startswith("copy_"):
        on_other = isinstance(args[0], Held)
    else:
        on_other = bool(there) if device is None else device.type == OTHER.type
    if not on_other:
        return result
    known = {id(one.held): one for one in there}  # an operation in place returns its own tensor

    def as_held(one: Any) -> Any:
        if not isinstance(one, Tensor):
            return one
        return known[id(one)] if id(one) in known else Held(one)

    return tree_map(as_held, result)
