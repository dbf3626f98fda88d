"""A metric of the user's own: a function of a model's output and the targets of a batch; higher is better."""

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpcompile.data.metric_values import MetricValues
from mpcompile.errors import LoadError, UsageError, first_line
from mpcompile.system.hashing import sha256
from mpcompile.system.tensor_hashing import sha256_of


@dataclass(frozen=True)
class Metric:
    """A metric with its name, the one that reports print.

    `function(outputs, targets)` gets the primary output of a model as a tensor (b, …) in float32 on the CPU, or, if a
    part of a model is compressed, what the whole model returns, such as a list of dicts of boxes. It also gets the
    targets of the batch: stacked to one tensor if they are numbers, arrays or tensors of one shape, else as a list. It
    returns b numbers, one for each sample, or one number for the batch. The metric of a set is the mean over samples.
    """

    name: str
    function: Callable[[Tensor, Any], Any] = field(repr=False)

    def of_batch(self, outputs: Any, targets: Sequence[Any]) -> MetricValues:
        """The values for one batch. Raises LoadError if the function raises, UsageError if it returns no numbers."""
        is_tensor = isinstance(outputs, Tensor | np.ndarray)
        given = torch.as_tensor(outputs).detach().cpu().float() if is_tensor else outputs
        count = len(targets)
        try:
            found = self.function(given, collated(targets))
        except Exception as error:
            raise LoadError(f"the metric {self.name} failed: {type(error).__name__}: {first_line(error)}") from error
        try:
            values = np.asarray(found.detach().cpu() if isinstance(found, Tensor) else found, dtype=np.float64)
        except (TypeError, ValueError):
            values = np.full((0, 0), np.nan)
        if values.shape not in ((), (count,)):
            what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor | np.ndarray) else type(found).__name__
            raise UsageError(
                f"the metric {self.name} returned {what} for a batch of {count}; it must return one number, or "
                "one for each sample"
            )
        if not np.isfinite(values).all():
            raise UsageError(f"the metric {self.name} returned a number that is not finite; it must return finite ones")
        return MetricValues(values.reshape(-1), count if values.ndim else 1, count)

    def key(self) -> str:
        """The hash of the name and of the source file of the function."""
        module = inspect.getmodule(self.function)
        file = getattr(sys.modules.get(module.__name__), "__file__", None) if module else None
        code = Path(file).read_bytes() if file and Path(file).is_file() else b""
        return sha256(self.name, code)


def collated(targets: Sequence[Any]) -> Any:
    """Targets of a batch as one tensor if they are numbers, arrays or tensors of one shape; else as a list."""
    if all(isinstance(one, Tensor | np.ndarray | np.generic | int | float) for one in targets):
        tensors = [torch.as_tensor(one) for one in targets]
        if len({(one.shape, one.dtype) for one in tensors}) == 1:
            return torch.stack(tensors)
    return list(targets)


def target_hash(target: Any) -> str:
    """The hash of a target: tensors and arrays by their bytes, containers by their parts, all else by its text."""
    if isinstance(target, Tensor):
        return sha256_of(target)
    if isinstance(target, np.ndarray) and target.dtype != object:
        return sha256_of(torch.as_tensor(target))
    if isinstance(target, dict):
        return sha256(*(part for key, value in target.items() for part in (repr(key), target_hash(value))))
    if isinstance(target, list | tuple):
        return sha256(*map(target_hash, target))
    return sha256(repr(target))
